// The operations between attention layers and matrix products, with gradients: what training needs of them. bfloat16
// and float16 tensors on a GPU go to our kernels (ops/cuda/layer_ops.cc); everything else is torch's own operations,
// which differentiate themselves.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace sparsek::ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// sum = x + update; out = sum / sqrt(mean(sum^2) + eps) * weight over the last dimension, rounded to `dtype`.
// x [..., dim] float32 (float64), update likewise in `dtype`, or none: then sum is x. weight [dim].
struct SumAndNorm {
  Tensor sum, out;
};
SumAndNorm add_rms_norm(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps,
                        at::ScalarType dtype);

// Cuts the product for q, k and v into heads and rotates q and k by position (half-split pairs; computed in the angles'
// type, rounded once). qkv [batch, seqlen, (num_heads + 2 num_kv_heads) head_dim]; cos, sin [1 or batch, 1 or seqlen,
// 1, head_dim / 2]. With far_cos and far_sin: q_far, q rotated by them, and k_far, k as it is (eq. 9); undefined
// without. On a GPU each result is contiguous, so that qkv need not be kept.
struct RotatedHeads {
  Tensor q, k, v, q_far, k_far;  // [batch, seqlen, num_heads or num_kv_heads, head_dim]
};
RotatedHeads split_rotary(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                          const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads);

// gate_up [..., 2 ffn] -> silu(gate) * up [..., ffn]. On the CPU silu is rounded before the product, as torch does.
Tensor swiglu(const Tensor& gate_up);

// The losses of rows of logits, and their gradient written over the logits. With p = softmax(logits), p_t =
// softmax(teacher): losses = -log p[target], divergences = sum of p_t (log p_t - log p), and where
// `writes_gradient` logits become next_token_weight (p - onehot(target)) + kl_weight (p - p_t). Rows whose target is
// `ignored` have 0 everywhere. logits [rows, vocab_size] contiguous, teacher likewise or none, targets int64 [rows] (a
// target outside the vocabulary is an error on the CPU, NaN on a GPU); results float32 (float64) [rows], divergences
// [0] without a teacher. Nothing of it can be differentiated again.
struct CrossEntropyOptions {
  int64_t ignored = -100;
  double next_token_weight = 1, kl_weight = 0;
  bool writes_gradient = false;
};
struct TokenLosses {
  Tensor losses, divergences;
};
TokenLosses cross_entropy_(Tensor& logits, const Tensor& targets, const MaybeTensor& teacher,
                           const CrossEntropyOptions& options);

}  // namespace sparsek::ops
