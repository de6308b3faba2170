#include "data/shards/packed_rows.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "data/shards/permutation.h"

namespace sparsek {

PackedRows::PackedRows(const DocumentSet& documents, const PackedOptions& options)
    : documents_(&documents), options_(options) {
  constexpr int64_t kMaxSeqlen = int64_t{1} << 30;
  if (options.seqlen < 1 || options.seqlen > kMaxSeqlen) {
    throw_field("seqlen", "expected 1 to {}, found {}", kMaxSeqlen, options.seqlen);
  }
  rows_per_epoch_ = (documents.num_tokens() + options.seqlen - 1) / options.seqlen;
}

void PackedRows::read(int64_t first_row, int64_t num_rows, PackedBatch& batch) const {
  if (first_row < 0) throw_field("first_row", "expected 0 or more, found {}", first_row);
  if (num_rows < 1 || num_rows > std::numeric_limits<int32_t>::max() / options_.seqlen) {
    throw_field("num_rows", "expected rows of at most {} tokens in all, found {} of {}",
                std::numeric_limits<int32_t>::max(), num_rows, options_.seqlen);
  }
  batch.ids.clear();
  batch.targets.clear();
  batch.cu_seqlens.clear();
  batch.num_targets = 0;
  for (int64_t row = first_row; row < first_row + num_rows; ++row) read_row(row, batch);
  batch.cu_seqlens.push_back(static_cast<int32_t>(batch.ids.size()));
}

void PackedRows::read_row(int64_t row, PackedBatch& batch) const {
  const int64_t epoch = row / rows_per_epoch_, num_tokens = documents_->num_tokens();
  int64_t block = row % rows_per_epoch_, shift = 0;
  if (options_.shuffle) {
    const uint64_t seed = mix_bits(options_.seed, static_cast<uint64_t>(epoch));
    block = Permutation(rows_per_epoch_, seed)(block);
    shift = static_cast<int64_t>(mix_bits(seed) % static_cast<uint64_t>(num_tokens));
  }
  const size_t row_end = batch.ids.size() + static_cast<size_t>(options_.seqlen);
  int64_t left = std::min(options_.seqlen, num_tokens - block * options_.seqlen);
  int64_t position = (shift + block * options_.seqlen) % num_tokens;
  while (left > 0) {
    documents_->visit_from(position, [&](const DocumentSet::Document& document) {
      const int64_t begin = document.begin + (position - document.position);
      const int64_t count = std::min(left, document.end - begin);
      const bool ends = begin + count == document.end;
      const size_t at = batch.ids.size(), size = static_cast<size_t>(count);
      batch.cu_seqlens.push_back(static_cast<int32_t>(at));
      batch.ids.resize(at + size + 1);  // one more: the last target
      documents_->shards().read(begin, std::span(batch.ids).subspan(at, size + (ends ? 0 : 1)));
      batch.targets.insert(batch.targets.end(), batch.ids.begin() + static_cast<int64_t>(at) + 1, batch.ids.end());
      if (ends) batch.targets.back() = kIgnoredTarget;
      batch.ids.resize(at + size);
      batch.num_targets += count - (ends ? 1 : 0);
      position += count;
      left -= count;
      return left > 0;
    });
    position = 0;  // the circle closes
  }
  if (batch.ids.size() < row_end) batch.cu_seqlens.push_back(static_cast<int32_t>(batch.ids.size()));
  batch.ids.resize(row_end, 0);
  batch.targets.resize(row_end, kIgnoredTarget);
}

}  // namespace sparsek
