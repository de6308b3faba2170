// The operations between attention layers as functions on tensors: products with packed weights, normalisation,
// rotation, SwiGLU, losses, and attention over explicit rows. Inference only. CPU tensors go to our kernels, those of
// other devices to torch's own operations (plain_ops.h).
//
// Layouts: activations are bfloat16 or float32 with a contiguous last dimension; norm weights, biases, cosines and
// sines float32 contiguous.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "base/quant.h"

namespace sparsek::ops {

using at::Tensor;

// W [out_features, in_features] in the form its kernel reads. Several matrices with the same input can be stacked.
struct PackedLinear {
  WeightType type = WeightType::kF32;
  int64_t out_features = 0, in_features = 0;
  Tensor data;   // uint8; undefined where `plain` is there instead
  Tensor bias;   // float32 [out_features], or undefined
  Tensor plain;  // W itself, bfloat16 or float32 on any device: the form plain operations read

  bool defined() const { return data.defined() || plain.defined(); }
  int64_t size_in_bytes() const;
};
PackedLinear plain_linear(const Tensor& weight, const Tensor& bias);

// While one with `chosen` lives, this thread's operations on CPU tensors are torch's own too, with plain weights: how
// tests see what other devices compute.
class PlainOperations {
 public:
  explicit PlainOperations(bool chosen);
  ~PlainOperations();
  PlainOperations(const PlainOperations&) = delete;
  PlainOperations& operator=(const PlainOperations&) = delete;

 private:
  bool before_;
};

// The types that kernels read as they are; the caller re-encodes others.
bool can_pack(WeightType type);
int64_t packed_size_bytes(WeightType type, int64_t out_features, int64_t in_features);
PackedLinear empty_packed(WeightType type, int64_t out_features, int64_t in_features);
// Takes the memory of packed weights from one mapping of large pages: a decode step reads all of them, with small pages
// 3 % slower (measured on SmolLM2).
class PackedArena {
 public:
  explicit PackedArena(int64_t size_bytes);
  // What one weight takes of it.
  static int64_t size_in_bytes(WeightType type, int64_t out_features, int64_t in_features);
  PackedLinear take(WeightType type, int64_t out_features, int64_t in_features);

 private:
  Tensor bytes_;  // shared by what was taken
  int64_t used_bytes_ = 0;
};
// Rows [row_begin, row_begin + count) from their blocks. Every row once, in any order.
void pack_rows(PackedLinear& weight, int64_t row_begin, int64_t count, const uint8_t* blocks);

// y = x W^T + bias: x [rows, in_features], y [rows, out_features] bfloat16 or float32.
void linear_out(const Tensor& x, const PackedLinear& weight, Tensor& y);
// y += x W^T + bias, y float32.
void linear_add_(Tensor& y, const Tensor& x, const PackedLinear& weight);
// Rows `ids` (int32 [tokens], checked where they are on the CPU) of W as float32 [tokens, in_features].
void embedding_out(const Tensor& ids, const PackedLinear& weight, Tensor& y);

// out = x / sqrt(mean(x^2) + eps) * weight per row; x float32 [rows, dim].
void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out);
// The same over head_dim of x [tokens, heads, head_dim], in place.
void head_norm_(Tensor& x, const Tensor& weight, double eps);

// (cos, sin) float32 [count, half] of position * inverse_frequency, angles in double.
std::pair<Tensor, Tensor> rotary_table(int64_t first_position, int64_t count,
                                       const std::vector<double>& inverse_frequencies);
// The same for plain operations, float32 [count, 2 half]: positions [count] on any device, inverse_frequencies float64
// [half] beside them.
std::pair<Tensor, Tensor> plain_rotary_table(const Tensor& positions, const Tensor& inverse_frequencies);
// Half-split rotation of x [tokens, heads, head_dim] into out (which may be x). cos, sin [tokens, head_dim / 2], or one
// row for all tokens; those of plain operations as wide as a head.
void rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out);

// gate_up [rows, 2 * ffn]: the first half becomes silu(gate) * up; returned as a view [rows, ffn].
Tensor swiglu_(Tensor& gate_up);

// Natural-log loss per row: logits float32 [rows, vocab], targets int32 [rows] (checked) -> float64 [rows].
Tensor cross_entropy(const Tensor& logits, const Tensor& targets);

// Attention over explicit rows (kernels/params.h, "Rows") where every visible key has weight 1. q [1, tokens,
// num_heads, head_dim], k, v [1, rows, num_kv_heads, head_dim]; window_begin int32 [tokens], undefined for 0;
// far_begin, far_end int32 [rows] or undefined (no far rows); these three on the CPU. q_far, k_far undefined: far rows
// use q, k. Returns [1, tokens, num_heads, head_dim].
struct RowAttentionInputs {
  Tensor q, k, v, q_far, k_far;
  Tensor window_begin, far_begin, far_end;
  int64_t num_carried = 0;
  double softmax_scale = 1.0;
};
Tensor row_attention(const RowAttentionInputs& inputs);

}  // namespace sparsek::ops
