// The operations of transformer_ops.h made of torch's own, for any device and for weights that are plain tensors. GPUs
// run them; on the CPU the kernels for packed weights are faster, and tests compare the two. transformer_ops.cc has
// checked shapes. Nothing up to swiglu_ waits for a device or reads a tensor's values, given tensors on one device, so
// that a step can be captured as a CUDA graph. Losses come to the CPU, and row_attention copies its rows from there.
#pragma once
#include <utility>

#include "ops/transformer_ops.h"

namespace sparsek::ops::plain {

// Whether operations on x run here: x is not on the CPU, or a PlainOperations lives.
bool is_chosen(const Tensor& x);

void linear_out(const Tensor& x, const PackedLinear& weight, Tensor& y);
void linear_add_(Tensor& y, const Tensor& x, const PackedLinear& weight);
void embedding_out(const Tensor& ids, const PackedLinear& weight, Tensor& y);
void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out);
void head_norm_(Tensor& x, const Tensor& weight, double eps);
void rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out);
Tensor swiglu_(Tensor& gate_up);
Tensor cross_entropy(const Tensor& logits, const Tensor& targets);
Tensor row_attention(const RowAttentionInputs& inputs);

}  // namespace sparsek::ops::plain
