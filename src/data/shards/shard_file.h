// One token shard, mapped (data/shards/format.h). Sizes are checked when it is opened; what lies in it when it is read,
// so that damaged bytes are an error and never a wrong address.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/mapped_file.h"
#include "data/shards/format.h"
#include "data/tokenizer.h"

namespace sparsek {

class ShardFile {
 public:
  explicit ShardFile(std::string path);
  // `bytes` outlive it; `name` stands for the file in messages.
  static ShardFile from_bytes(std::span<const uint8_t> bytes, std::string name);

  const std::string& path() const { return name_; }
  int64_t vocab_size() const { return header_.vocab_size; }
  int64_t num_tokens() const { return header_.num_tokens; }
  int64_t num_documents() const { return header_.num_documents; }
  std::string_view tokenizer() const { return {header_.tokenizer, sizeof(header_.tokenizer)}; }
  int64_t size_bytes() const { return static_cast<int64_t>(bytes_.size()); }

  // Where document `i` of those that begin here begins. DataError when it begins before the one before it.
  int64_t document_begin(int64_t i) const;
  uint64_t document_key(int64_t i) const;
  // Tokens [begin, begin + out.size()), which lie in the shard. DataError for an id outside the vocabulary.
  void read(int64_t begin, std::span<TokenId> out) const;
  std::string sha256() const;  // of the file

 private:
  ShardFile(std::span<const uint8_t> bytes, std::string name, std::optional<MappedFile> file);

  std::string name_;
  std::optional<MappedFile> file_;
  std::span<const uint8_t> bytes_;
  ShardHeader header_{};
};

}  // namespace sparsek
