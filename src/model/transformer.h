// A language model of the Llama family: token ids in, hidden states, logits or losses out, in chunks of any length over
// a DecodeState. A chunk of one token is the decode step. Inference only: no gradients.
//
//   Transformer model = Transformer::load({.path = "model.gguf"});
//   DecodeState state = model.new_state();
//   at::Tensor hidden = model.forward(ids, state);                      // [tokens, dim]
//   at::Tensor logits = model.logits(hidden.slice(0, tokens - 1));      // [1, vocab_size]
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/attention_config.h"
#include "model/config.h"
#include "model/decode_state.h"
#include "model/placement.h"

namespace sparsek::model {

struct LoadOptions {
  std::string path;  // a GGUF file, or a Hugging Face directory
  AttentionRequest attention;
  // dtype: of activations and matrix products; kFloat computes everything in float32. A GPU computes in bfloat16.
  Placement placement = {};
  int64_t chunk_size = 512;  // longest chunk forward() is promised to get, for the memory check before loading
  // Tokens that will be read and written in all, where somebody knows: dense attention's cache of so many must fit
  // before anything is loaded, and is allocated at once. Beyond them it grows.
  std::optional<int64_t> expected_tokens = {};
};

class Transformer {
 public:
  // Throws DataError for the file, UsageError for the options; DataError too when the memory it needs is not available.
  static Transformer load(const LoadOptions& options);
  ~Transformer();
  Transformer(Transformer&&) noexcept;
  Transformer& operator=(Transformer&&) noexcept;

  const std::string& path() const;  // it was loaded from
  const ModelConfig& config() const;
  const AttentionConfig& attention() const;
  // Lines a person should read once: adapter values overridden, weights re-encoded.
  const std::vector<std::string>& notices() const;
  int64_t weight_bytes() const;
  at::Device device() const;

  DecodeState new_state() const;

  // ids: int32 [tokens] on the CPU, each in [0, vocab_size). Returns the final normalised hidden states [tokens, dim]
  // on the model's device and advances the state. The result does not depend on how a document is cut into chunks (up
  // to floating-point order).
  at::Tensor forward(const at::Tensor& ids, DecodeState& state) const;

  // hidden: [rows, dim] of forward(); float32 [rows, vocab_size], on the CPU.
  at::Tensor logits(const at::Tensor& hidden) const;

  // Natural-log cross entropy of targets (int32 [rows]) row by row, without ever holding all logits.
  std::vector<double> losses(const at::Tensor& hidden, const at::Tensor& targets) const;

 private:
  struct Parts;
  explicit Transformer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace sparsek::model
