// Some of the documents of token shards in their order: the training or the validation part, without those too short.
//
// Which part a document is in depends on its key (its text) and the seed: adding, removing or reordering others moves
// none, equal documents stay together, and so it is with another tokenizer. A sparse index (16 bytes for 256
// documents), made when it is constructed, finds a document by number and by token.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "data/shards/token_shards.h"

namespace sparsek {

enum class Split { kAll, kTrain, kValidation };

struct DocumentSetOptions {
  Split split = Split::kAll;
  double validation_fraction = 0.01;  // of the documents, on average
  uint64_t seed = 0;
  int64_t min_tokens = 2;  // shorter documents are left out; one token alone predicts nothing
};

class DocumentSet {
 public:
  // The shards outlive it. Throws UsageError naming the option that is wrong, and DataError when no document is left.
  DocumentSet(const TokenShards& shards, const DocumentSetOptions& options);

  int64_t size() const { return size_; }
  int64_t num_tokens() const { return num_tokens_; }
  const TokenShards& shards() const { return *shards_; }

  struct Document {
    int64_t index;       // in the shards
    int64_t begin, end;  // in the shards' sequence of tokens
    int64_t position;    // of its first token among the set's
    int64_t size() const { return end - begin; }
  };
  Document document(int64_t number) const;       // in [0, size())
  Document document_at(int64_t position) const;  // the one that holds this token of the set, in [0, num_tokens())
  // Calls visit(document) for that one and those after it, until it returns false or they end.
  template <class Visit>
  void visit_from(int64_t position, Visit visit) const;

 private:
  static constexpr int64_t kStride = 256;
  struct Mark {
    int64_t num_documents, num_tokens;  // of the set before document kStride * i of the shards
  };
  bool contains(const TokenShards::Document& document) const;

  const TokenShards* shards_;
  DocumentSetOptions options_;
  uint64_t limit_ = 0;  // hashes below it are validation
  int64_t size_ = 0, num_tokens_ = 0;
  std::vector<Mark> marks_;
};

template <class Visit>
void DocumentSet::visit_from(int64_t position, Visit visit) const {
  const auto mark = std::upper_bound(marks_.begin(), marks_.end(), position,
                                     [](int64_t p, const Mark& m) { return p < m.num_tokens; }) -
                    1;
  int64_t at = mark->num_tokens;
  shards_->visit_documents((mark - marks_.begin()) * kStride, [&](int64_t index, const TokenShards::Document& found) {
    if (!contains(found)) return true;
    const Document document{index, found.begin, found.end, at};
    at += found.size();
    return at <= position || visit(document);
  });
}

}  // namespace sparsek
