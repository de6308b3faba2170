// Our own CUDA kernels for what plain_ops.h would take several launches for. Each returns false, with nothing done,
// where they do not apply: tensors on the CPU or not bfloat16, or a build without them.
#pragma once
#include "ops/transformer_ops.h"

namespace sparsek::ops::gpu {

bool rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out);
bool rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out);
bool swiglu_(Tensor& gate, const Tensor& up);

}  // namespace sparsek::ops::gpu
