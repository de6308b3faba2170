// Writes one token shard; the file appears when it is whole.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/atomic_file.h"
#include "data/tokenizer.h"

namespace sparsek {

struct ShardSummary {
  int64_t num_tokens = 0, num_documents = 0, size_bytes = 0;
  std::string sha256;  // of the file
};

class ShardWriter {
 public:
  ShardWriter(std::string path, int64_t vocab_size, std::string_view tokenizer_fingerprint);

  void begin_document(uint64_t key);  // the tokens that follow are a new document's
  void append(std::span<const TokenId> ids);
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return static_cast<int64_t>(begins_.size()); }
  ShardSummary finish();  // nothing may follow

 private:
  AtomicFile file_;
  int64_t vocab_size_, num_tokens_ = 0;
  std::string tokenizer_;
  uint32_t token_bytes_;
  std::vector<int64_t> begins_;
  std::vector<uint64_t> keys_;
  std::vector<uint16_t> narrow_;
};

}  // namespace sparsek
