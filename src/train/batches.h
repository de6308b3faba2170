// Where batches come from, one after the other, and where a run that was ended goes on.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "train/config.h"

namespace sparsek::train {

struct Batch {
  at::Tensor ids;                      // int64 [batch, seqlen], on the CPU
  at::Tensor targets;                  // int64 [batch, seqlen]: the next token, or kIgnored
  std::vector<int32_t> document_ends;  // of a packed row (batch 1): where its documents end; empty: one document a row
  std::vector<uint8_t> starts;         // recurrent: rows whose document begins here; empty: all
  int64_t num_targets = 0;             // that count
};

class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual Batch next() = 0;
  // What seek() needs for next() to give the same batch again; text that a checkpoint keeps.
  virtual std::string position() const = 0;
  // Throws DataError when the text is none of this source's.
  virtual void seek(const std::string& position) = 0;
  virtual int64_t vocab_size() const = 0;  // every id is below
  // Of the files that batches come from; empty: they are generated.
  virtual std::string fingerprint() const { return {}; }
  // Rows that next() gives before it begins anew; nullopt: batches without end, or documents in chunks.
  virtual std::optional<int64_t> rows_per_epoch() const { return std::nullopt; }
};

enum class Split : uint8_t { kTrain, kValidation };

// data.*, recurrent.* and, of the validation part, validation.from_position of a run. Throws DataError for data that
// cannot be used.
std::unique_ptr<BatchSource> open_batches(const TrainConfig& config, Split split);

// The number that a position of some source is; `where`: whose, for the message of a DataError.
int64_t parse_position(const std::string& text, const char* where);

// Key-value recall across the window, without end, by seed: pairs of a key and its value lie in noise; at the end of a
// row as many keys are asked, and their values, the next tokens, are the only targets. `gap` noise tokens at least
// stand between pairs and questions. Validation asks each key once. Training draws a key for each question: if each
// came once, naming a value that has not been said yet would be right so often that the look-up is learned late or
// never. Practice: each pair is told num_repeats times more (less often where there is no room), at most `reach` tokens
// behind the first time, and there its value is a target too, in the training part alone: what is asked across the gap
// is learned nearby first, where any attention finds it.
struct RecallOptions {
  int64_t batch, seqlen, num_pairs, num_keys, num_values, num_noise, num_repeats, reach, gap, seed;
  Split split;
};
std::unique_ptr<BatchSource> make_recall(const RecallOptions& options);

// Token shards (data/shards): packed rows as one row with document_ends, or whole documents in order, a chunk at a
// time.
std::unique_ptr<BatchSource> open_shards(const TrainConfig& config, Split split);

// The same batches without the targets before position `first` of their document: position 0 is a document's first
// token, or the first that a packed row holds of it; a target's is one more than its input's.
std::unique_ptr<BatchSource> without_early_targets(std::unique_ptr<BatchSource> batches, int64_t first);

// Each row of `rows`, which must not be packed, as a document that comes in chunks.
std::unique_ptr<BatchSource> cut_into_chunks(std::unique_ptr<BatchSource> rows, int64_t chunk);

}  // namespace sparsek::train
