#include "ops/gpu_elementwise.h"

#ifdef SPARSEK_TORCH_CUDA  // this build has CUDA kernels, and its torch CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/elementwise/elementwise.h"
#endif

namespace sparsek::ops::gpu {

#ifdef SPARSEK_TORCH_CUDA
namespace {

bool applies(const Tensor& x) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16;
}

}  // namespace

bool rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  if (!applies(out)) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::rms_norm({.x = x.const_data_ptr<float>(),
                  .weight = weight.const_data_ptr<float>(),
                  .out = out.mutable_data_ptr(),
                  .x_stride = x.stride(0),
                  .out_stride = out.stride(0),
                  .rows = x.size(0),
                  .dim = static_cast<int32_t>(x.size(1)),
                  .eps = static_cast<float>(eps)},
                 c10::cuda::getCurrentCUDAStream());
  return true;
}

bool rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out) {
  if (!applies(x)) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  // cos holds each angle twice, sin (-sin | sin): the second halves are the angles' own.
  const int64_t half = x.size(2) / 2, angle_stride = cos.size(0) == 1 ? 0 : cos.stride(0);
  cuda::RotaryParams params{.num_parts = 1, .head_dim = static_cast<int32_t>(x.size(2)), .tokens = x.size(0)};
  params.parts[0] = {.first = {.x = x.const_data_ptr(),
                               .cos = cos.const_data_ptr<float>() + half,
                               .sin = sin.const_data_ptr<float>() + half,
                               .x_token_stride = x.stride(0),
                               .x_head_stride = x.stride(1),
                               .angle_token_stride = angle_stride},
                     .out = out.mutable_data_ptr(),
                     .out_token_stride = out.stride(0),
                     .out_head_stride = out.stride(1),
                     .heads = static_cast<int32_t>(x.size(1))};
  cuda::rotary(params, c10::cuda::getCurrentCUDAStream());
  return true;
}

bool swiglu_(Tensor& gate, const Tensor& up) {
  if (!applies(gate)) return false;
  const c10::cuda::CUDAGuard guard(gate.device());
  cuda::swiglu({.gate = gate.const_data_ptr(),
                .up = up.const_data_ptr(),
                .out = gate.mutable_data_ptr(),
                .gate_stride = gate.stride(0),
                .up_stride = up.stride(0),
                .out_stride = gate.stride(0),
                .rows = gate.size(0),
                .ffn = static_cast<int32_t>(gate.size(1))},
               c10::cuda::getCurrentCUDAStream());
  return true;
}
#else
bool rms_norm_out(const Tensor&, const Tensor&, double, Tensor&) {
  return false;
}
bool rotary_out(const Tensor&, const Tensor&, const Tensor&, Tensor&) {
  return false;
}
bool swiglu_(Tensor&, const Tensor&) {
  return false;
}
#endif

}  // namespace sparsek::ops::gpu
