// Rows of seqlen tokens, packed from documents without gaps, in an order that a seed decides.
//
// The set's documents, one after the other, are cut every seqlen tokens. A document that a cut divides goes on in
// another row, without what came before. Each epoch cuts elsewhere (the circle of all tokens begins at a place the
// seed decides) and takes the rows in another order; each token is an input exactly once an epoch. Row r of the run is
// found from r alone: the state of a run is the number of rows it has taken.
#pragma once
#include <cstdint>
#include <vector>

#include "data/shards/document_set.h"
#include "data/tokenizer.h"

namespace sparsek {

inline constexpr TokenId kIgnoredTarget = -100;  // what PyTorch's cross-entropy leaves out

struct PackedOptions {
  int64_t seqlen = 0;
  uint64_t seed = 0;
  bool shuffle = true;  // false: in order, cut from the first token on, in every epoch (validation)
};

struct PackedBatch {
  std::vector<TokenId> ids;      // [rows, seqlen]; padding is 0, only behind an epoch's last token
  std::vector<TokenId> targets;  // [rows, seqlen]: the document's next token; kIgnoredTarget at its last one
  // Begins of the stretches of one document in ids taken as one sequence, and the end; a row begins one always, and
  // padding is a stretch of its own.
  std::vector<int32_t> cu_seqlens;
  int64_t num_targets = 0;  // not ignored
};

class PackedRows {
 public:
  // The set outlives it. Throws UsageError naming the option that is wrong.
  PackedRows(const DocumentSet& documents, const PackedOptions& options);

  int64_t rows_per_epoch() const { return rows_per_epoch_; }
  // Rows [first_row, first_row + num_rows) of the run, which goes through epochs without end. Any rows, in any order,
  // by any number of threads.
  void read(int64_t first_row, int64_t num_rows, PackedBatch& batch) const;

 private:
  void read_row(int64_t row, PackedBatch& batch) const;

  const DocumentSet* documents_;
  PackedOptions options_;
  int64_t rows_per_epoch_;
};

}  // namespace sparsek
