// The weights of a model in the form that its operations read: packed once at load, file pages released on the way, so
// that memory never holds two copies. Quantised weights stay quantised; types without a kernel are re-encoded. For
// plain operations (another device than the CPU) every matrix becomes a tensor of the activations' dtype, one after the
// other.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/placement.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {

struct LayerWeights {
  at::Tensor attention_norm;           // [dim]
  ops::PackedLinear qkv;               // rows of q, k, v below each other
  at::Tensor query_norm, key_norm;     // [head_dim], undefined without qk_norm
  ops::PackedLinear attention_output;  // [dim, q_dim]
  at::Tensor ffn_norm;                 // [dim]
  ops::PackedLinear gate_up;           // rows of gate, up below each other
  ops::PackedLinear down;              // [dim, ffn_dim]
};

struct Weights {
  ops::PackedLinear embedding;
  ops::PackedLinear output;  // the embedding's data when tied
  at::Tensor final_norm;
  std::vector<LayerWeights> layers;
  std::vector<std::string> notices;  // what was re-encoded
  int64_t size_in_bytes() const;
};

// Packed, float16 weights become Q8_0 for kBFloat16, float32 for kFloat. Throws DataError for tensors
// that are missing, of a wrong shape, or hold NaN or infinity.
Weights load_weights(const Checkpoint& checkpoint, const Placement& placement);
// What load_weights will allocate.
int64_t planned_weight_bytes(const Checkpoint& checkpoint, const Placement& placement);

// The type a stack of matrices is packed in: their common type if it has a kernel, else float32 for plain floats that
// must stay exact, else Q8_0.
WeightType packed_type(const std::vector<WeightType>& types, int64_t in_features, at::ScalarType dtype);
// Throws DataError naming the tensor when a float or a block scale in it is not finite.
void check_finite(const WeightView& view, const std::string& source);

}  // namespace sparsek::model
