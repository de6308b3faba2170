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
  // The model of the config.json at `path`, with weights that are made instead of read: for measuring a shape.
  bool random_weights = false;
  AttentionRequest attention;
  // dtype: of activations and matrix products; kFloat computes everything in float32. A GPU computes in bfloat16.
  Placement placement = {};
  int64_t chunk_size = 512;  // longest chunk forward() is promised to get, for the memory check before loading
  // Tokens that will be read and written in all, where somebody knows: dense attention's cache of so many must fit
  // before anything is loaded, and is allocated at once. Beyond them it grows.
  std::optional<int64_t> expected_tokens = {};
  int64_t documents = 1;  // whose states of kind sparsek will exist at a time, for the same check
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
  // The documents of several states of this model side by side, in a copy: forward() then takes one token of each.
  // Kind sparsek only (UsageError). Documents of different lengths must have filled their windows, unless the scorer is
  // one that does not wait for that (key_norm, or an adapter whose alphas are 0).
  DecodeState join(const std::vector<const DecodeState*>& states) const;

  // ids: int32 on the CPU, each in [0, vocab_size): [tokens], or [documents] for a state of several, one token of each.
  // Returns the final normalised hidden states [ids, dim] on the model's device and advances the state. The result does
  // not depend on how a document is cut into chunks, nor on the documents beside it (up to floating-point order).
  at::Tensor forward(const at::Tensor& ids, DecodeState& state) const;

  // hidden: [rows, dim] of forward(); float32 [rows, vocab_size], on the CPU.
  at::Tensor logits(const at::Tensor& hidden) const;

  // The ids of each row's largest logit, chosen where the model is; int32 [rows] on the CPU.
  at::Tensor most_likely(const at::Tensor& hidden) const;

  // Natural-log cross entropy of targets (int32 [rows]) row by row, without ever holding all logits.
  std::vector<double> losses(const at::Tensor& hidden, const at::Tensor& targets) const;

 private:
  struct Parts;
  explicit Transformer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

}  // namespace sparsek::model
