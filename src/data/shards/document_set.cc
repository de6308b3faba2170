#include "data/shards/document_set.h"

#include <cassert>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "data/shards/permutation.h"

namespace sparsek {

DocumentSet::DocumentSet(const TokenShards& shards, const DocumentSetOptions& options)
    : shards_(&shards), options_(options) {
  const double fraction = options.validation_fraction;
  if (!(fraction >= 0 && fraction < 1)) {
    throw_field("validation_fraction", "expected a number from 0 to below 1, found {}", fraction);
  }
  if (options.min_tokens < 2) throw_field("min_tokens", "expected 2 or more, found {}", options.min_tokens);
  limit_ = static_cast<uint64_t>(std::ldexp(fraction, 64));
  shards.visit_documents(0, [this](int64_t index, const TokenShards::Document& document) {
    if (index % kStride == 0) marks_.push_back({size_, num_tokens_});
    if (contains(document)) {
      ++size_;
      num_tokens_ += document.size();
    }
    return true;
  });
  if (size_ > 0) return;
  const char* part = options.split == Split::kTrain        ? "training "
                     : options.split == Split::kValidation ? "validation "
                                                           : "";
  throw_data("{}: expected {}documents of {} tokens or more, found none among {} (validation fraction {})",
             shards.path(), part, options.min_tokens, shards.num_documents(), fraction);
}

bool DocumentSet::contains(const TokenShards::Document& document) const {
  if (document.size() < options_.min_tokens) return false;
  if (options_.split == Split::kAll) return true;
  return (mix_bits(options_.seed, document.key) < limit_) == (options_.split == Split::kValidation);
}

DocumentSet::Document DocumentSet::document(int64_t number) const {
  assert(number >= 0 && number < size_);
  const auto mark = std::upper_bound(marks_.begin(), marks_.end(), number,
                                     [](int64_t n, const Mark& m) { return n < m.num_documents; }) -
                    1;
  int64_t left = number - mark->num_documents, position = mark->num_tokens;
  std::optional<Document> result;
  shards_->visit_documents((mark - marks_.begin()) * kStride, [&](int64_t index, const TokenShards::Document& found) {
    if (!contains(found)) return true;
    if (left-- == 0) result = Document{index, found.begin, found.end, position};
    position += found.size();
    return !result;
  });
  return result.value();
}

DocumentSet::Document DocumentSet::document_at(int64_t position) const {
  assert(position >= 0 && position < num_tokens_);
  std::optional<Document> result;
  visit_from(position, [&](const Document& document) {
    result = document;
    return false;
  });
  return result.value();
}

}  // namespace sparsek
