// sparsek bench model: reading and decoding speed of a model behind contexts of several lengths, on random tokens.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "cli/stopwatch.h"
#include "model/token_ids.h"

namespace sparsek::cli {

int run_bench_model(const BenchModelConfig& config) {
  if (config.decode_tokens < 1) throw_usage("--decode-tokens: expected 1 or more, found {}", config.decode_tokens);
  for (const int64_t context : config.contexts) {
    if (context < 1) throw_usage("--context: expected 1 or more tokens, found {}", context);
  }
  const int64_t longest = *std::max_element(config.contexts.begin(), config.contexts.end());
  const model::Transformer model =
      open_model(config.model, resolve_model(config.model.model), longest + config.decode_tokens);
  const c10::InferenceMode inference;
  std::mt19937_64 random(1);
  const auto random_ids = [&](int64_t count) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint64_t>(model.config().vocab_size));
    return ids;
  };
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  if (!config.json) fmt::print("{:>9} {:>16} {:>16} {:>12}\n", "context", "read tokens/s", "decode tokens/s", "state");
  for (const int64_t context : config.contexts) {
    model::DecodeState state = model.new_state();
    Progress progress(reading_on(model), "tokens", context);
    const Stopwatch read_time;
    at::Tensor hidden;
    for (int64_t done = 0; done < context;) {
      const std::vector<int32_t> ids = random_ids(std::min(config.model.chunk_size, context - done));
      hidden = model.forward(model::as_tensor(ids), state);
      done += static_cast<int64_t>(ids.size());
      progress.update(done);
      if (interrupted()) return kInterruptedExitCode;
    }
    model.logits(hidden.slice(0, hidden.size(0) - 1));
    const double read_rate = static_cast<double>(context) / read_time.seconds();
    const Stopwatch decode_time;
    for (int64_t i = 0; i < config.decode_tokens; ++i) {
      if (interrupted()) return kInterruptedExitCode;
      const std::vector<int32_t> id = random_ids(1);
      model.logits(model.forward(model::as_tensor(id), state));
    }
    const double decode_rate = static_cast<double>(config.decode_tokens) / decode_time.seconds();
    if (!config.json) {
      fmt::print("{:>9} {:>16.0f} {:>16.1f} {:>12}\n", with_separators(context), read_rate, decode_rate,
                 human_bytes(static_cast<double>(state.size_in_bytes())));
    }
    results.push_back({{"context", context},
                       {"read_tokens_per_second", read_rate},
                       {"decode_tokens_per_second", decode_rate},
                       {"state_bytes", state.size_in_bytes()}});
  }
  if (config.json) {
    const nlohmann::ordered_json object{
        {"model", config.model.model},        {"attention", describe(model.attention())},
        {"dtype", config.model.dtype},        {"device", model.device().str()},
        {"chunk", config.model.chunk_size},   {"threads", omp_get_max_threads()},
        {"peak_rss_bytes", peak_rss_bytes()}, {"results", results}};
    print_json(object, 2);
  }
  return 0;
}

}  // namespace sparsek::cli
