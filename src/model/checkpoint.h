// A model file opened: a GGUF file or a Hugging Face folder behind one interface, tensors under one set of names. Views
// only; packing for the kernels is in weights.h.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "data/gguf.h"
#include "data/hf_checkpoint.h"
#include "model/config.h"

namespace sparsek::model {

// Every weight this model family can have. Those up to kFinalNorm exist once, the others once a layer.
enum class WeightId : uint8_t {
  kEmbedding,      // [vocab_size, dim]
  kOutput,         // [vocab_size, dim], absent when tied
  kFinalNorm,      // [dim]
  kAttentionNorm,  // [dim]
  kQuery,          // [num_heads * head_dim, dim], rows head after head, half-split rotary order
  kKey,            // [num_kv_heads * head_dim, dim]
  kValue,          // [num_kv_heads * head_dim, dim]
  kAttentionOutput,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kAttentionOutputBias,
  kQueryNorm,  // [head_dim]
  kKeyNorm,    // [head_dim]
  kFfnNorm,    // [dim]
  kGate,       // [ffn_dim, dim]
  kUp,         // [ffn_dim, dim]
  kDown,       // [dim, ffn_dim]
};

class Checkpoint {
 public:
  // A folder is read as a Hugging Face checkpoint, anything else as GGUF. Throws DataError; unknown tensors in the file
  // are refused, since a model that needs them would be computed wrongly without a word.
  explicit Checkpoint(const std::string& path);
  // The shape of a config.json with made-up weights: norms are one, all others share the same random bfloat16 numbers
  // (uniform, standard deviation 0.02). For measuring a shape whose weights are not here. Throws DataError.
  static Checkpoint random(const std::string& config_path);

  const ModelConfig& config() const { return config_; }
  const std::string& path() const { return path_; }

  // Nothing when the model as configured has no such weight; DataError naming the tensor when the file should have it
  // and does not, or has it in another shape.
  std::optional<WeightView> find(WeightId id, int64_t layer = 0) const;
  WeightView weight(WeightId id, int64_t layer = 0) const;
  // Pages of a weight go back to the kernel once it was copied.
  void release(const WeightView& weight) const;

  // Whether rows of query and key matrices (and biases) come in interleaved rotary order, as GGUF's llama architecture
  // has them: row 2 i + h of a head is row h * head_dim / 2 + i of ours.
  bool has_interleaved_rotary(WeightId id) const;

  // All tensors of the file, under its own names; none of made-up ones.
  std::vector<WeightView> tensors() const;

 private:
  Checkpoint() = default;
  void refuse_unknown_tensors() const;

  std::string path_;
  std::optional<GgufFile> gguf_;
  std::optional<HfCheckpoint> huggingface_;
  std::vector<BFloat16> random_, ones_;  // random(): what all its weights are views of
  ModelConfig config_;
};

}  // namespace sparsek::model
