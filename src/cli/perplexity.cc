// sparsek perplexity: the loss of a model on a text, by position.
#include "eval/perplexity.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"

namespace sparsek::cli {
namespace {

void print_object(const eval::PerplexityResult& result, const std::string& attention, const std::string& device) {
  nlohmann::ordered_json by_position = nlohmann::ordered_json::array();
  for (const auto& bucket : result.loss.buckets()) {
    if (bucket.count == 0) continue;
    const int64_t to = std::min(bucket.to, result.tokens);
    by_position.push_back(
        {{"from", bucket.from}, {"to", to}, {"loss", bucket.sum / static_cast<double>(bucket.count)}});
  }
  const nlohmann::ordered_json object{{"tokens", result.tokens},
                                      {"loss", result.loss.mean()},
                                      {"loss_by_position", by_position},
                                      {"tokens_per_second", static_cast<double>(result.tokens) / result.seconds},
                                      {"state_bytes", result.state_bytes},
                                      {"peak_rss_bytes", peak_rss_bytes()},
                                      {"attention", attention},
                                      {"device", device},
                                      {"complete", result.complete}};
  print_json(object);
}

void print_table(const eval::PerplexityResult& result, const std::string& attention, const std::string& device) {
  fmt::print("attention    {}\n", attention);
  if (device != "cpu") fmt::print("device       {}\n", device);
  fmt::print("tokens       {}\n", with_separators(result.tokens));
  fmt::print("loss         {:.4f} nats per token (perplexity {:.2f})\n", result.loss.mean(),
             std::exp(result.loss.mean()));
  fmt::print("speed        {:.0f} tokens/s\n", static_cast<double>(result.tokens) / result.seconds);
  fmt::print("state        {}\n", human_bytes(static_cast<double>(result.state_bytes)));
  fmt::print("peak memory  {}\n\n", human_bytes(static_cast<double>(peak_rss_bytes())));
  fmt::print("{:>10} {:>10} {:>8}\n", "from", "to", "loss");
  for (const auto& bucket : result.loss.buckets()) {
    if (bucket.count == 0) continue;
    fmt::print("{:>10} {:>10} {:>8.4f}\n", with_separators(bucket.from),
               with_separators(std::min(bucket.to, result.tokens)), bucket.sum / static_cast<double>(bucket.count));
  }
}

}  // namespace

int run_perplexity(const PerplexityConfig& config) {
  if (config.skip_tokens < 0) throw_usage("--skip-tokens: expected 0 or more, found {}", config.skip_tokens);
  if (config.max_tokens != 0 && config.max_tokens < 2) {
    throw_usage("--max-tokens: expected at least 2 (a token and the one it predicts), found {}", config.max_tokens);
  }
  const std::string path = resolve_model(config.model.model);
  const Tokenizer tokenizer = open_tokenizer(path);
  FileTokens tokens(tokenizer, config.file);
  std::vector<int32_t> prefix = tokenizer.prefix();  // BOS, where the tokenizer wants one
  // What is left of a file's tokens after the options; nothing for streams, of which --max-tokens says no more than how
  // long they may be.
  const auto to_read =
      [&config, beside = static_cast<int64_t>(prefix.size())](std::optional<int64_t> total) -> std::optional<int64_t> {
    if (!total) return std::nullopt;
    const int64_t rest = std::max<int64_t>(*total - config.skip_tokens, 0) + beside;
    return config.max_tokens > 0 ? std::min(rest, config.max_tokens) : rest;
  };
  const model::Transformer model = open_model(config.model, path, to_read(tokens.expected_total()));
  tokenizer.check_model_vocab(model.config().vocab_size, path);

  std::vector<int32_t> skipped;
  for (int64_t left = config.skip_tokens; left > 0; left -= static_cast<int64_t>(skipped.size())) {
    if (interrupted()) return kInterruptedExitCode;
    skipped.clear();
    tokens.read(std::min<int64_t>(left, 4096), skipped);
    if (skipped.empty()) {
      throw_data("{}: expected more than {} tokens to skip, found {}", config.file, config.skip_tokens,
                 config.skip_tokens - left);
    }
  }

  int64_t left = config.max_tokens > 0 ? config.max_tokens : std::numeric_limits<int64_t>::max();
  const auto source = [&](int64_t wanted, std::vector<int32_t>& ids) {
    const size_t before = ids.size();
    wanted = std::min(wanted, left);
    if (!prefix.empty()) {
      ids.insert(ids.end(), prefix.begin(), prefix.end());
      wanted -= static_cast<int64_t>(prefix.size());
      prefix.clear();
    }
    tokens.read(wanted, ids);
    left -= static_cast<int64_t>(ids.size() - before);
  };
  eval::PerplexityResult result;
  {
    Progress progress(reading_on(model), "tokens", std::nullopt);
    result = eval::perplexity(model, source, tokens_at_once(config.model), [&](int64_t done) {
      if (const auto total = to_read(tokens.estimated_total())) progress.set_total(*total);
      progress.update(done);
      return !interrupted();
    });
  }
  if (result.loss.count() == 0) {
    throw_data("{}: expected a text of at least 2 tokens, found {}", config.file, result.tokens);
  }
  const std::string attention = describe(model.attention()), device = model.device().str();
  if (config.json) {
    print_object(result, attention, device);
  } else {
    print_table(result, attention, device);
  }
  if (!result.complete) {
    fmt::print(stderr, "sparsek: interrupted after {} tokens; the figures are for those\n", result.tokens);
    return kInterruptedExitCode;
  }
  return 0;
}

}  // namespace sparsek::cli
