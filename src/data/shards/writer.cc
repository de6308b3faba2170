#include "data/shards/writer.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "base/mapped_file.h"
#include "base/sha256.h"
#include "data/shards/format.h"

namespace sparsek {
namespace {

template <class T>
std::span<const uint8_t> bytes_of(std::span<const T> values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size_bytes()};
}

}  // namespace

ShardWriter::ShardWriter(std::string path, int64_t vocab_size, std::string_view tokenizer_fingerprint)
    : file_(std::move(path)),
      vocab_size_(vocab_size),
      tokenizer_(tokenizer_fingerprint),
      token_bytes_(shard_token_bytes(vocab_size)) {
  const ShardHeader header{};  // its numbers come last
  file_.write(bytes_of(std::span(&header, 1)));
}

void ShardWriter::begin_document(uint64_t key) {
  begins_.push_back(num_tokens_);
  keys_.push_back(key);
}

void ShardWriter::append(std::span<const TokenId> ids) {
  assert(std::all_of(ids.begin(), ids.end(), [this](TokenId id) { return id >= 0 && id < vocab_size_; }));
  num_tokens_ += static_cast<int64_t>(ids.size());
  if (token_bytes_ == 4) return file_.write(bytes_of(ids));
  narrow_.assign(ids.begin(), ids.end());
  file_.write(bytes_of(std::span<const uint16_t>(narrow_)));
}

ShardSummary ShardWriter::finish() {
  const uint8_t zeros[8] = {};
  file_.write({zeros, static_cast<size_t>(shard_begins_offset(num_tokens_, token_bytes_) - file_.size_bytes())});
  file_.write(bytes_of(std::span<const int64_t>(begins_)));
  file_.write(bytes_of(std::span<const uint64_t>(keys_)));
  ShardHeader header{};
  std::copy(std::begin(kShardMagic), std::end(kShardMagic), header.magic);
  header.version = kShardVersion;
  header.token_bytes = token_bytes_;
  header.vocab_size = vocab_size_;
  header.num_tokens = num_tokens_;
  header.num_documents = num_documents();
  assert(tokenizer_.size() == sizeof(header.tokenizer));
  std::copy(tokenizer_.begin(), tokenizer_.end(), header.tokenizer);
  file_.write_at(0, bytes_of(std::span<const ShardHeader>(&header, 1)));
  ShardSummary summary{num_tokens_, num_documents(), file_.size_bytes(), {}};
  summary.sha256 = sha256_of(MappedFile(file_.part_path()));
  file_.commit();
  return summary;
}

}  // namespace sparsek
