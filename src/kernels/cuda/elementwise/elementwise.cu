// rms_norm, rotary and swiglu: memory-bound, so one plain pass each. A block reads its row of the norm twice; the second
// time it lies in the L1 cache.
#include "kernels/cuda/elementwise/elementwise.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/cuda/launch.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // beyond, threads take several elements

int blocks_for(int64_t elements) {
  return static_cast<int>(std::min((elements + kThreads - 1) / kThreads, kMaxBlocks));
}

__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  __shared__ float partial[kThreads / 32];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float* x = p.x + row * p.x_stride;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < p.dim; i += kThreads) sum += x[i] * x[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    __syncthreads();  // the row before has read partial
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) total += partial[warp];
    const float scale = 1.0f / sqrtf(total / static_cast<float>(p.dim) + p.eps);
    auto* out = static_cast<__nv_bfloat16*>(p.out) + row * p.out_stride;
    for (int i = threadIdx.x; i < p.dim; i += kThreads) out[i] = __float2bfloat16_rn(x[i] * scale * p.weight[i]);
  }
}

__global__ void __launch_bounds__(kThreads) rotary_kernel(RotaryParams p) {
  const int half = p.head_dim / 2;
  const int64_t pairs = p.tokens * p.heads * half, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < pairs; i += stride) {
    const int c = static_cast<int>(i % half);
    const int64_t head = i / half % p.heads, token = i / half / p.heads;
    const auto* x = static_cast<const __nv_bfloat16*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    auto* out = static_cast<__nv_bfloat16*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    const float *cos = p.cos + token * p.angle_stride, *sin = p.sin + token * p.angle_stride;
    const float low = __bfloat162float(x[c]), high = __bfloat162float(x[c + half]);
    out[c] = __float2bfloat16_rn(low * cos[c] + high * sin[c]);
    out[c + half] = __float2bfloat16_rn(high * cos[c + half] + low * sin[c + half]);
  }
}

__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams p) {
  const int64_t elements = p.rows * p.ffn, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < elements; i += stride) {
    const int64_t row = i / p.ffn, column = i % p.ffn;
    auto* gate = static_cast<__nv_bfloat16*>(p.gate) + row * p.gate_stride + column;
    const float g = __bfloat162float(*gate);
    const float up = __bfloat162float(static_cast<const __nv_bfloat16*>(p.up)[row * p.up_stride + column]);
    *gate = __float2bfloat16_rn(g / (1.0f + __expf(-g)) * up);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.dim == 0) return;
  rms_norm_kernel<<<static_cast<int>(std::min(params.rows, kMaxBlocks)), kThreads, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "rms_norm");
}

void rotary(const RotaryParams& params, cudaStream_t stream) {
  const int64_t pairs = params.tokens * params.heads * (params.head_dim / 2);
  if (pairs == 0) return;
  rotary_kernel<<<blocks_for(pairs), kThreads, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "rotary");
}

void swiglu(const SwigluParams& params, cudaStream_t stream) {
  const int64_t elements = params.rows * params.ffn;
  if (elements == 0) return;
  swiglu_kernel<<<blocks_for(elements), kThreads, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "swiglu");
}

}  // namespace sparsek::cuda
