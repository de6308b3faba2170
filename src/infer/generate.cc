#include "infer/generate.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "base/error.h"
#include "model/token_ids.h"

namespace sparsek {
namespace {

std::vector<float> to_vector(const at::Tensor& logits) {
  const float* data = logits.const_data_ptr<float>();
  return {data, data + logits.numel()};
}

// Names the model, of which the sampler knows nothing.
int32_t sample(const model::Transformer& model, Sampler& sampler, std::span<float> logits) {
  try {
    return sampler.sample(logits);
  } catch (const DataError& error) {
    throw_data("{}: {}", model.path(), error.what());
  }
}

}  // namespace

Prompt::Prompt(const model::Transformer& model, model::DecodeState& state, Sampler& sampler, int64_t chunk_size)
    : model_(model), state_(state), sampler_(sampler), chunk_size_(static_cast<size_t>(chunk_size)) {
  pending_.reserve(chunk_size_);
}

void Prompt::push(std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    sampler_.observe(id);
    pending_.push_back(id);
    if (pending_.size() == chunk_size_) compute();
  }
}

void Prompt::compute() {
  const c10::InferenceMode inference;
  const at::Tensor hidden = model_.forward(model::as_tensor(pending_), state_);
  last_hidden_ = hidden.slice(0, hidden.size(0) - 1).clone();  // a clone, or all of the chunk would stay alive
  pending_.clear();
}

std::vector<float> Prompt::finish() {
  if (!pending_.empty()) compute();
  if (!last_hidden_.defined()) throw_data("the prompt is empty: expected at least one token to continue from");
  const c10::InferenceMode inference;
  return to_vector(model_.logits(last_hidden_));
}

int64_t generate(const model::Transformer& model, model::DecodeState& state, Sampler& sampler,
                 std::vector<float> logits, int64_t max_tokens, std::span<const int32_t> end_tokens,
                 const std::function<bool(int32_t)>& on_token) {
  const c10::InferenceMode inference;
  for (int64_t generated = 0; generated < max_tokens; ++generated) {
    const int32_t token = sample(model, sampler, logits);
    if (std::find(end_tokens.begin(), end_tokens.end(), token) != end_tokens.end()) return generated;
    sampler.observe(token);
    if (!on_token(token)) return generated + 1;
    if (generated + 1 == max_tokens) return max_tokens;  // nothing will be sampled after it
    const at::Tensor hidden = model.forward(model::as_tensor({&token, 1}), state);
    logits = to_vector(model.logits(hidden));
  }
  return std::max<int64_t>(max_tokens, 0);
}

}  // namespace sparsek
