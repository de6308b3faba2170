// A folder of token shards as one sequence of tokens and of documents.
//
// Opening reads the manifest and the header of each shard; tokens are mapped and read as they are asked for. All
// reading is const and may be done by several threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/shards/shard_file.h"
#include "data/tokenizer.h"

namespace sparsek {

class TokenShards {
 public:
  struct Document {
    int64_t begin, end;  // positions in the sequence of all tokens
    uint64_t key;
    int64_t size() const { return end - begin; }
  };

  // Throws DataError naming the file for a folder that no run finished, and for shards that are missing, truncated or
  // of another tokenizer than the manifest says.
  explicit TokenShards(std::string folder);

  const std::string& path() const { return folder_; }
  int64_t num_tokens() const { return token_offsets_.back(); }
  int64_t num_documents() const { return document_offsets_.back(); }
  int64_t num_shards() const { return static_cast<int64_t>(shards_.size()); }
  int64_t vocab_size() const { return vocab_size_; }
  const std::string& tokenizer_fingerprint() const { return tokenizer_; }
  std::string fingerprint() const;  // of all files, by the hashes in the manifest: hex

  Document document(int64_t i) const;
  // Calls visit(i, document) for the documents from `first` on, in order, until it returns false or they end.
  template <class Visit>
  void visit_documents(int64_t first, Visit visit) const;
  // Tokens [begin, begin + out.size()) of the sequence.
  void read(int64_t begin, std::span<TokenId> out) const;

  // Throws DataError naming both when the shards are not of this tokenizer. `name` stands for it in the message.
  void check_tokenizer(const Tokenizer& tokenizer, std::string_view name) const;
  // Reads all shards and compares their hashes with the manifest's: DataError naming the file and both hashes. Asks
  // `go_on` with the bytes read after each shard, and stops when it says no.
  void verify(const std::function<bool(int64_t)>& go_on) const;

 private:
  size_t shard_of_document(int64_t i) const {
    return static_cast<size_t>(std::upper_bound(document_offsets_.begin(), document_offsets_.end(), i) -
                               document_offsets_.begin()) -
           1;
  }
  Document document_in(size_t shard, int64_t local) const;

  std::string folder_;
  std::vector<ShardFile> shards_;
  std::vector<std::string> sha256_;
  std::vector<int64_t> token_offsets_, document_offsets_;  // of each shard, and the end
  std::vector<int64_t> next_begins_;                       // of the first document that begins after each shard
  int64_t vocab_size_ = 0;
  std::string tokenizer_;
};

template <class Visit>
void TokenShards::visit_documents(int64_t first, Visit visit) const {
  if (first >= num_documents()) return;
  size_t shard = shard_of_document(first);
  for (int64_t i = first; i < num_documents(); ++i) {
    while (i >= document_offsets_[shard + 1]) ++shard;
    if (!visit(i, document_in(shard, i - document_offsets_[shard]))) return;
  }
}

}  // namespace sparsek
