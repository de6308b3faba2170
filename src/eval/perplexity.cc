#include "eval/perplexity.h"

#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cmath>
#include <span>

#include "base/error.h"
#include "model/token_ids.h"

namespace sparsek::eval {

PerplexityResult perplexity(const model::Transformer& model, const TokenSource& source, int64_t chunk_size,
                            const std::function<bool(int64_t)>& on_progress) {
  const c10::InferenceMode inference;
  PerplexityResult result;
  model::DecodeState state = model.new_state();
  const auto start = std::chrono::steady_clock::now();
  const auto chunk = static_cast<size_t>(chunk_size);

  // ids holds one chunk and, where there is one, the token after it: the last row's target.
  std::vector<int32_t> ids;
  ids.reserve(chunk + 1);
  source(chunk_size + 1, ids);
  while (!ids.empty()) {
    const size_t rows = std::min(ids.size(), chunk);
    const at::Tensor hidden = model.forward(model::as_tensor(std::span(ids).first(rows)), state);
    const size_t targets = ids.size() > rows ? rows : rows - 1;
    if (targets > 0) {
      const std::vector<double> losses = model.losses(hidden.slice(0, 0, static_cast<int64_t>(targets)),
                                                      model::as_tensor(std::span(ids).subspan(1, targets)));
      for (size_t i = 0; i < targets; ++i) {
        const int64_t position = result.tokens + 1 + static_cast<int64_t>(i);
        if (!std::isfinite(losses[i])) {
          throw_data("{}: expected finite losses, found {} at token {}: the weights are damaged; get the file again",
                     model.path(), losses[i], position);
        }
        result.loss.add(position, losses[i]);
      }
    }
    result.tokens += static_cast<int64_t>(rows);
    ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(rows));
    if (on_progress && !on_progress(result.tokens)) {
      result.complete = false;
      result.tokens += static_cast<int64_t>(ids.size());  // the last row's target: it was predicted, so it is read
      break;
    }
    if (!ids.empty()) source(chunk_size, ids);
  }
  result.state_bytes = state.size_in_bytes();
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace sparsek::eval
