// Reading a prompt and continuing it: tokens in, tokens out, over a model's decode state.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "infer/sampler.h"
#include "model/transformer.h"

namespace sparsek {

// Reads tokens of any number into a state, chunk by chunk; keeps one chunk of ids and the last hidden state.
class Prompt {
 public:
  Prompt(const model::Transformer& model, model::DecodeState& state, Sampler& sampler, int64_t chunk_size);
  // Queues tokens; a chunk is computed as soon as it is full.
  void push(std::span<const int32_t> ids);
  // Computes what is queued and returns the logits [vocab_size] of the token after it, float32. Throws DataError when
  // no token was ever pushed.
  std::vector<float> finish();
  int64_t tokens() const { return state_.length() + static_cast<int64_t>(pending_.size()); }

 private:
  void compute();
  const model::Transformer& model_;
  model::DecodeState& state_;
  Sampler& sampler_;
  size_t chunk_size_;
  std::vector<int32_t> pending_;
  at::Tensor last_hidden_;  // [1, dim]
};

// Samples up to `max_tokens` tokens after `logits`; each is given to on_token, which returns false to stop (the token
// is then not read into the state). Stops by itself at a token of `end_tokens`, which is not given to on_token. Returns
// the number of tokens given out.
int64_t generate(const model::Transformer& model, model::DecodeState& state, Sampler& sampler,
                 std::vector<float> logits, int64_t max_tokens, std::span<const int32_t> end_tokens,
                 const std::function<bool(int32_t)>& on_token);

}  // namespace sparsek
