// Any bytes as a token shard: either a DataError, or documents and tokens that can be read.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "base/error.h"
#include "data/shards/shard_file.h"

namespace sparsek {
namespace {

template <class Action>
void allow_refusal(const Action& action) {
  try {
    action();
  } catch (const DataError&) {
  }
}

void read_everything(std::span<const uint8_t> bytes) {
  const ShardFile shard = ShardFile::from_bytes(bytes, "fuzz");
  uint64_t keys = 0;
  for (int64_t i = 0; i < shard.num_documents(); ++i) {
    keys ^= shard.document_key(i);
    allow_refusal([&] {
      const int64_t begin = shard.document_begin(i);
      if (begin < 0 || begin > shard.num_tokens()) std::abort();
    });
  }
  std::vector<TokenId> ids(static_cast<size_t>(shard.num_tokens()));
  allow_refusal([&] {
    shard.read(0, ids);
    for (const TokenId id : ids) {
      if (id < 0 || id >= shard.vocab_size()) std::abort();
    }
  });
  for (int64_t i = 0; i < shard.num_tokens(); i += 7) {
    allow_refusal([&] { shard.read(i, std::span(ids).first(1)); });
  }
  if (keys == 1 && ids.empty()) std::abort();  // keeps the reads
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sparsek::allow_refusal([&] { sparsek::read_everything({data, size}); });
  return 0;
}
