// The loss of a model on one document, read chunk by chunk: nothing here grows with the document but the model's own
// state (and that only for dense attention).
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "eval/position_loss.h"
#include "model/transformer.h"

namespace sparsek::eval {

// Appends up to `wanted` next tokens of the document to `ids`; appends nothing at its end.
using TokenSource = std::function<void(int64_t wanted, std::vector<int32_t>& ids)>;

struct PerplexityResult {
  int64_t tokens = 0;  // read, the first one included
  PositionLoss loss;   // of tokens 1 .. tokens - 1
  double seconds = 0;  // reading and computing, loading the model not included
  int64_t state_bytes = 0;
  bool complete = true;  // false: on_progress asked to stop
};

// `on_progress(tokens read)` is called after each chunk; returning false stops there. Documents of fewer than two
// tokens have no loss (count 0).
PerplexityResult perplexity(const model::Transformer& model, const TokenSource& source, int64_t chunk_size,
                            const std::function<bool(int64_t)>& on_progress);

}  // namespace sparsek::eval
