// sparsek inspect SHARDS: what token shards hold, whether they are whole, and the text of one document.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/source.h"
#include "data/shards/token_shards.h"

namespace sparsek::cli {
namespace {

struct Lengths {
  struct Bucket {
    int64_t documents = 0, tokens = 0;
  };
  std::vector<Bucket> buckets;  // bucket b: lengths from 2^(b-1) to below 2^b; 0: empty
  int64_t min = std::numeric_limits<int64_t>::max(), max = 0;
};

Lengths count_lengths(const TokenShards& shards) {
  Lengths lengths;
  shards.visit_documents(0, [&](int64_t, const TokenShards::Document& document) {
    const int64_t size = document.size();
    const auto bucket = static_cast<size_t>(std::bit_width(static_cast<uint64_t>(size)));
    if (bucket >= lengths.buckets.size()) lengths.buckets.resize(bucket + 1);
    lengths.buckets[bucket].documents += 1;
    lengths.buckets[bucket].tokens += size;
    lengths.min = std::min(lengths.min, size);
    lengths.max = std::max(lengths.max, size);
    return !interrupted();
  });
  return lengths;
}

int64_t bucket_begin(size_t bucket) {
  return bucket == 0 ? 0 : int64_t{1} << (bucket - 1);
}

void print_document(const TokenShards& shards, int64_t index, const Tokenizer& tokenizer) {
  if (index < 0 || index >= shards.num_documents()) {
    throw_usage("--document: expected 0 to {}, found {}", shards.num_documents() - 1, index);
  }
  const TokenShards::Document document = shards.document(index);
  std::vector<TokenId> ids;
  for (int64_t at = document.begin; at < document.end && !interrupted(); at += static_cast<int64_t>(ids.size())) {
    ids.resize(static_cast<size_t>(std::min<int64_t>(document.end - at, 65536)));
    shards.read(at, ids);
    const std::string text = tokenizer.decode(ids);
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
}

void verify(const TokenShards& shards) {
  Progress progress("verifying", "bytes", std::nullopt);
  shards.verify([&](int64_t bytes) {
    progress.update(bytes);
    return !interrupted();
  });
  if (interrupted()) throw Interrupted("interrupted before all shards were verified");
}

}  // namespace

int run_inspect_shards(const InspectShardsConfig& config) {
  const TokenShards shards(config.shards);
  if (!config.model.empty()) {
    const Tokenizer tokenizer = open_tokenizer_file(config.model);
    shards.check_tokenizer(tokenizer, config.model);
    if (config.document) {
      print_document(shards, *config.document, tokenizer);
      return interrupted() ? kInterruptedExitCode : 0;
    }
  } else if (config.document) {
    throw_usage("--document: expected --model, whose tokenizer turns tokens into text, found none");
  }
  if (config.verify) verify(shards);
  const Lengths lengths = count_lengths(shards);
  const double mean = static_cast<double>(shards.num_tokens()) / static_cast<double>(shards.num_documents());
  if (config.json) {
    nlohmann::ordered_json histogram = nlohmann::ordered_json::array();
    for (size_t b = 0; b < lengths.buckets.size(); ++b) {
      const Lengths::Bucket& bucket = lengths.buckets[b];
      if (bucket.documents == 0) continue;
      histogram.push_back({{"from", bucket_begin(b)},
                           {"to", int64_t{1} << b},
                           {"documents", bucket.documents},
                           {"tokens", bucket.tokens}});
    }
    print_json({{"path", config.shards},
                {"tokens", shards.num_tokens()},
                {"documents", shards.num_documents()},
                {"shards", shards.num_shards()},
                {"vocab_size", shards.vocab_size()},
                {"tokenizer_sha256", shards.tokenizer_fingerprint()},
                {"verified", config.verify},
                {"length", {{"min", lengths.min}, {"mean", mean}, {"max", lengths.max}}},
                {"lengths", histogram}},
               2);
    return 0;
  }
  fmt::print("{}\n", config.shards);
  fmt::print("tokens      {} in {} shards{}\n", with_separators(shards.num_tokens()),
             with_separators(shards.num_shards()), config.verify ? ", whose hashes are right" : "");
  fmt::print("documents   {} of {} to {} tokens, {} on average\n", with_separators(shards.num_documents()),
             with_separators(lengths.min), with_separators(lengths.max), with_separators(static_cast<int64_t>(mean)));
  fmt::print("tokenizer   {} tokens, sha256 {}\n\n", with_separators(shards.vocab_size()),
             shards.tokenizer_fingerprint());
  fmt::print("{:>14} {:>14} {:>14} {:>9}\n", "tokens from", "to below", "documents", "of tokens");
  for (size_t b = 0; b < lengths.buckets.size(); ++b) {
    const Lengths::Bucket& bucket = lengths.buckets[b];
    if (bucket.documents == 0) continue;
    fmt::print(
        "{:>14} {:>14} {:>14} {:>8.1f}%\n", with_separators(bucket_begin(b)), with_separators(int64_t{1} << b),
        with_separators(bucket.documents),
        100.0 * static_cast<double>(bucket.tokens) / static_cast<double>(std::max<int64_t>(shards.num_tokens(), 1)));
  }
  return 0;
}

}  // namespace sparsek::cli
