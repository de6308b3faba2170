#include "data/shards/shard_file.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/sha256.h"
#include "data/quote.h"

namespace sparsek {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 48;  // keeps sizes in bytes far from overflow

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

}  // namespace

ShardFile::ShardFile(std::string path) {
  MappedFile file(std::move(path));
  const std::span<const uint8_t> bytes = file.bytes();
  std::string name = file.path();
  *this = ShardFile(bytes, std::move(name), std::move(file));
}

ShardFile ShardFile::from_bytes(std::span<const uint8_t> bytes, std::string name) {
  return ShardFile(bytes, std::move(name), std::nullopt);
}

ShardFile::ShardFile(std::span<const uint8_t> bytes, std::string name, std::optional<MappedFile> file)
    : name_(std::move(name)), file_(std::move(file)), bytes_(bytes) {
  if (bytes.size() < sizeof(ShardHeader)) {
    throw_data("{}: expected a token shard, found {} bytes; it is truncated", name_, bytes.size());
  }
  header_ = load<ShardHeader>(bytes.data());
  if (!std::equal(std::begin(kShardMagic), std::end(kShardMagic), header_.magic)) {
    throw_data("{}: expected a token shard, found a file that begins with {}", name_,
               in_quotes({header_.magic, sizeof(header_.magic)}));
  }
  if (header_.version != kShardVersion) {
    throw_data("{}: expected version {} of token shards, found {}", name_, kShardVersion, header_.version);
  }
  const auto in_range = [](int64_t count) { return count >= 0 && count <= kMaxCount; };
  if (header_.vocab_size < 1 || header_.vocab_size > INT32_MAX || !in_range(header_.num_tokens) ||
      !in_range(header_.num_documents) || header_.token_bytes != shard_token_bytes(header_.vocab_size)) {
    throw_data(
        "{}: expected counts of a token shard, found vocabulary {}, {} bytes a token, {} tokens and {} documents",
        name_, header_.vocab_size, header_.token_bytes, header_.num_tokens, header_.num_documents);
  }
  const int64_t size_bytes = shard_size_bytes(header_.num_tokens, header_.token_bytes, header_.num_documents);
  if (size_bytes != static_cast<int64_t>(bytes.size())) {
    throw_data("{}: expected {} bytes for {} tokens and {} documents, found {}; it is truncated or damaged", name_,
               size_bytes, header_.num_tokens, header_.num_documents, bytes.size());
  }
}

int64_t ShardFile::document_begin(int64_t i) const {
  assert(i >= 0 && i < num_documents());
  const uint8_t* begins = bytes_.data() + shard_begins_offset(num_tokens(), header_.token_bytes);
  const int64_t begin = load<int64_t>(begins + i * 8);
  const int64_t before = i > 0 ? load<int64_t>(begins + (i - 1) * 8) : 0;
  if (begin < before || begin < 0 || begin > num_tokens()) {
    throw_data("{}: expected document {} to begin at {} to {}, found {}; it is damaged", name_, i, before, num_tokens(),
               begin);
  }
  return begin;
}

uint64_t ShardFile::document_key(int64_t i) const {
  assert(i >= 0 && i < num_documents());
  return load<uint64_t>(bytes_.data() + shard_begins_offset(num_tokens(), header_.token_bytes) +
                        (num_documents() + i) * 8);
}

void ShardFile::read(int64_t begin, std::span<TokenId> out) const {
  assert(begin >= 0 && begin + static_cast<int64_t>(out.size()) <= num_tokens());
  const uint8_t* tokens = bytes_.data() + sizeof(ShardHeader) + begin * header_.token_bytes;
  uint32_t largest = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const uint32_t id = header_.token_bytes == 2 ? load<uint16_t>(tokens + i * 2) : load<uint32_t>(tokens + i * 4);
    largest = std::max(largest, id);
    out[i] = static_cast<TokenId>(id);
  }
  if (largest >= static_cast<uint64_t>(vocab_size())) {
    throw_data("{}: expected ids below {}, found {} after token {}; it is damaged", name_, vocab_size(), largest,
               begin);
  }
}

std::string ShardFile::sha256() const {
  if (file_) return sha256_of(*file_);
  Sha256 hash;
  hash.update(bytes_);
  return hash.hex();
}

}  // namespace sparsek
