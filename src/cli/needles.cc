// sparsek needles: which of the sentences that were put into a text the model finds again, by their depth.
#include "eval/needles.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"

namespace sparsek::cli {
namespace {

double share(int64_t right, int64_t asked) {
  return asked > 0 ? static_cast<double>(right) / static_cast<double>(asked) : 0;
}

}  // namespace

int run_needles(const NeedlesConfig& config) {
  eval::NeedleOptions options;
  options.task = eval::parse_needle_task(config.task);
  options.tokens = config.tokens;
  options.depths = config.depths;
  options.samples = config.samples;
  options.digits = config.digits;
  options.seed = config.seed;
  options.chunk_size = tokens_at_once(config.model);
  eval::check(options);
  const std::string path = resolve_model(config.model.model);
  const Tokenizer tokenizer = open_tokenizer(path);
  const int64_t wanted = eval::haystack_tokens(options);
  std::vector<int32_t> haystack;
  FileTokens tokens(tokenizer, config.file);
  while (static_cast<int64_t>(haystack.size()) < wanted) {
    const size_t before = haystack.size();
    tokens.read(std::min<int64_t>(wanted - static_cast<int64_t>(before), 65536), haystack);
    if (haystack.size() == before) break;
    if (interrupted()) return kInterruptedExitCode;
  }
  constexpr int64_t kLongestQuestion = 256;
  const model::Transformer model =
      open_model(config.model, path, options.tokens + kLongestQuestion, /*documents=*/2);  // a question has a copy
  tokenizer.check_model_vocab(model.config().vocab_size, path);
  eval::NeedleResult result;
  {
    Progress progress(reading_on(model), "tokens", wanted);
    result = eval::needles(model, tokenizer, haystack, options, [&](int64_t done) {
      progress.update(done);
      return !interrupted();
    });
  }

  int64_t asked = 0, right = 0;
  double tokens_right = 0;
  nlohmann::ordered_json depths = nlohmann::ordered_json::array();
  for (const eval::NeedleDepth& depth : result.depths) {
    asked += depth.asked;
    right += depth.right;
    tokens_right += depth.token_accuracy * static_cast<double>(depth.asked);
    depths.push_back({{"depth", depth.depth},
                      {"distance", depth.distance},
                      {"asked", depth.asked},
                      {"right", depth.right},
                      {"token_accuracy", depth.token_accuracy},
                      {"answer_loss", depth.answer_loss}});
  }
  std::vector<double> by_place;
  for (size_t i = 0; i < result.answers.size(); ++i)
    by_place.push_back(share(result.tokens_right[i], result.answers[i]));
  const double token_accuracy = asked > 0 ? tokens_right / static_cast<double>(asked) : 0;
  const std::string attention = describe(model.attention());
  if (config.json) {
    print_json({{"task", config.task},
                {"tokens", options.tokens},
                {"digits", eval::num_digits(options)},
                {"accuracy", share(right, asked)},
                {"token_accuracy", token_accuracy},
                {"token_accuracy_by_place", by_place},
                {"asked", asked},
                {"depths", depths},
                {"seed", options.seed},
                {"tokens_per_second", static_cast<double>(result.tokens) / result.seconds},
                {"state_bytes", result.state_bytes},
                {"attention", attention},
                {"device", model.device().str()},
                {"complete", result.complete}});
  } else {
    fmt::print("attention    {}\n", attention);
    fmt::print("tokens       {} before each question\n", with_separators(options.tokens));
    fmt::print("right        {} of {} ({:.1f} %)\n", right, asked, 100 * share(right, asked));
    fmt::print("tokens right {:.1f} %, by place in the answer:", 100 * token_accuracy);
    for (const double place : by_place) fmt::print(" {:.0f}", 100 * place);
    fmt::print("\n");
    fmt::print("speed        {:.0f} tokens/s\n\n", static_cast<double>(result.tokens) / result.seconds);
    fmt::print("{:>6} {:>9} {:>6} {:>6} {:>12} {:>12}\n", "depth", "distance", "asked", "right", "tokens right",
               "answer loss");
    for (const eval::NeedleDepth& depth : result.depths) {
      fmt::print("{:>6.3f} {:>9} {:>6} {:>6} {:>10.1f} % {:>12.3f}\n", depth.depth,
                 with_separators(static_cast<int64_t>(depth.distance)), depth.asked, depth.right,
                 100 * depth.token_accuracy, depth.answer_loss);
    }
  }
  if (!result.complete) {
    fmt::print(stderr, "sparsek: interrupted after {} tokens; the figures are for those\n", result.tokens);
    return kInterruptedExitCode;
  }
  return 0;
}

}  // namespace sparsek::cli
