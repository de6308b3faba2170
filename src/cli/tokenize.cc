// sparsek tokenize: a corpus to token shards.
#include "data/corpus/tokenize.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "cli/stopwatch.h"
#include "data/quote.h"

namespace sparsek::cli {
namespace {

constexpr int64_t kMaxThreads = 1024, kMaxShardMib = int64_t{1} << 20;

std::optional<TokenId> end_token(const std::string& text, const Tokenizer& tokenizer) {
  if (text == "auto") return default_end_token(tokenizer);
  if (text == "none") return std::nullopt;
  if (const auto id = tokenizer.find_special(text)) return id;
  throw_usage("--end-token: expected auto, none or a special token of the tokenizer, found {}", in_quotes(text));
}

TokenizeOptions options_from(const TokenizeConfig& config, const Tokenizer& tokenizer) {
  const int64_t cores = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
  return {.inputs = {config.inputs, config.suffixes},
          .documents = {config.field, config.skip_bad_lines},
          .out = config.out,
          .end_token = end_token(config.end_token, tokenizer),
          .special = config.parse_special ? SpecialTokens::kParse : SpecialTokens::kAsText,
          .shard_bytes = config.shard_mib << 20,
          .threads = config.threads == 0 ? cores : config.threads};
}

void print_result(const TokenizeResult& result, const TokenizeConfig& config, double seconds) {
  const TokenizeTotals& totals = result.totals;
  const double mb_per_second = static_cast<double>(result.run_text_bytes) * 1e-6 / seconds;
  const double tokens_per_second = static_cast<double>(result.run_tokens) / seconds;
  if (config.json) {
    nlohmann::ordered_json object{{"out", config.out},
                                  {"tokens", totals.tokens},
                                  {"documents", totals.documents},
                                  {"empty_documents", totals.empty_documents},
                                  {"skipped_lines", totals.skipped_lines},
                                  {"text_bytes", totals.text_bytes},
                                  {"shards", totals.shards},
                                  {"input_files", totals.input_files},
                                  {"input_bytes", totals.input_bytes},
                                  {"resumed_shards", result.resumed_shards},
                                  {"seconds", seconds},
                                  {"mb_per_second", mb_per_second},
                                  {"tokens_per_second", tokens_per_second},
                                  {"peak_rss_bytes", peak_rss_bytes()}};
    print_json(object);
    return;
  }
  fmt::print("{}\n", config.out);
  fmt::print("tokens       {} in {} shards\n", with_separators(totals.tokens), totals.shards);
  fmt::print("documents    {} from {} files of {}\n", with_separators(totals.documents),
             with_separators(totals.input_files), human_bytes(static_cast<double>(totals.input_bytes)));
  if (totals.empty_documents > 0)
    fmt::print("left out     {} empty documents\n", with_separators(totals.empty_documents));
  if (totals.skipped_lines > 0) fmt::print("left out     {} bad lines\n", with_separators(totals.skipped_lines));
  fmt::print("text         {}, {:.2f} bytes a token\n", human_bytes(static_cast<double>(totals.text_bytes)),
             static_cast<double>(totals.text_bytes) / static_cast<double>(std::max<int64_t>(totals.tokens, 1)));
  if (result.was_complete) {
    fmt::print("finished by an earlier run; nothing to do\n");
  } else {
    if (result.resumed_shards > 0) fmt::print("resumed      after {} finished shards\n", result.resumed_shards);
    fmt::print("speed        {:.1f} MB/s, {} tokens/s\n", mb_per_second,
               with_separators(static_cast<int64_t>(tokens_per_second)));
  }
  fmt::print("peak memory  {}\n", human_bytes(static_cast<double>(peak_rss_bytes())));
}

}  // namespace

int run_tokenize(const TokenizeConfig& config) {
  if (config.threads < 0 || config.threads > kMaxThreads) {
    throw_usage("--threads: expected 0 (one a core) to {}, found {}", kMaxThreads, config.threads);
  }
  if (config.shard_mib < 1 || config.shard_mib > kMaxShardMib) {
    throw_usage("--shard-mib: expected 1 to {}, found {}", kMaxShardMib, config.shard_mib);
  }
  if (config.out.empty()) throw_usage("--out: expected the path of a folder, found an empty path");
  const Tokenizer tokenizer = open_tokenizer_file(config.model);
  const TokenizeOptions options = options_from(config, tokenizer);
  const Stopwatch stopwatch;
  TokenizeResult result;
  {
    Progress progress("tokenizing", "tokens", std::nullopt);
    result = tokenize_corpus(tokenizer, options, [&](const TokenizeProgress& done) {
      if (done.input_bytes > 0) {  // tokens of the whole, extrapolated
        const double ratio = static_cast<double>(done.input_bytes_left) / static_cast<double>(done.input_bytes);
        progress.set_total(done.tokens + static_cast<int64_t>(static_cast<double>(done.tokens) * ratio));
      }
      progress.update(done.tokens);
      return !interrupted();
    });
  }
  if (!result.is_complete) {
    throw Interrupted(
        fmt::format("interrupted after {} tokens; finished shards are kept in {}: run the same command again",
                    result.run_tokens, config.out));
  }
  print_result(result, config, stopwatch.seconds());
  return 0;
}

}  // namespace sparsek::cli
