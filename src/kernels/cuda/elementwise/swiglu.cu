// swiglu and its gradient.
#include <algorithm>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/launch.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256, kWidth = 8;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // beyond, threads take several elements

__device__ float sigmoid(float x) {
  return 1.0f / (1.0f + __expf(-x));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const __grid_constant__ SwigluParams p) {
  const int64_t packs = p.ffn / kWidth, all = p.rows * packs, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t row = i / packs, c = (i - row * packs) * kWidth;
    const Pack<T, kWidth> gate = load<kWidth>(static_cast<const T*>(p.gate) + row * p.gate_stride + c);
    const Pack<T, kWidth> up = load<kWidth>(static_cast<const T*>(p.up) + row * p.up_stride + c);
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float g = widen(gate.at[j]);
      out.at[j] = narrow<T>(g * sigmoid(g) * widen(up.at[j]));
    }
    store(static_cast<T*>(p.out) + row * p.out_stride + c, out);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(const __grid_constant__ SwigluBwdParams p) {
  const int64_t packs = p.ffn / kWidth, all = p.rows * packs, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t row = i / packs, c = (i - row * packs) * kWidth, at = row * 2 * p.ffn + c;
    const Pack<T, kWidth> gate = load<kWidth>(static_cast<const T*>(p.gate_up) + at);
    const Pack<T, kWidth> up = load<kWidth>(static_cast<const T*>(p.gate_up) + at + p.ffn);
    const Pack<T, kWidth> dout = load<kWidth>(static_cast<const T*>(p.dout) + row * p.ffn + c);
    Pack<T, kWidth> dgate, dup;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float g = widen(gate.at[j]), s = sigmoid(g), d = widen(dout.at[j]);
      dgate.at[j] = narrow<T>(d * widen(up.at[j]) * s * (1.0f + g * (1.0f - s)));
      dup.at[j] = narrow<T>(d * g * s);
    }
    store(static_cast<T*>(p.dgate_up) + at, dgate);
    store(static_cast<T*>(p.dgate_up) + at + p.ffn, dup);
  }
}

int blocks_for(int64_t items) {
  return static_cast<int>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
}

}  // namespace

void swiglu(const SwigluParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.ffn == 0) return;
  const bool vector = all_multiples({p.ffn, p.gate_stride, p.up_stride, p.out_stride}, kWidth) &&
                      all_aligned({p.gate, p.up, p.out}, 16);
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (vector) {
      swiglu_kernel<T, kWidth><<<blocks_for(p.rows * p.ffn / kWidth), kThreads, 0, stream>>>(p);
    } else {
      swiglu_kernel<T, 1><<<blocks_for(p.rows * p.ffn), kThreads, 0, stream>>>(p);
    }
  });
  check_cuda(cudaGetLastError(), "swiglu");
}

void swiglu_backward(const SwigluBwdParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.ffn == 0) return;
  const bool vector = p.ffn % kWidth == 0 && all_aligned({p.dout, p.gate_up, p.dgate_up}, 16);
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (vector) {
      swiglu_backward_kernel<T, kWidth><<<blocks_for(p.rows * p.ffn / kWidth), kThreads, 0, stream>>>(p);
    } else {
      swiglu_backward_kernel<T, 1><<<blocks_for(p.rows * p.ffn), kThreads, 0, stream>>>(p);
    }
  });
  check_cuda(cudaGetLastError(), "swiglu_backward");
}

}  // namespace sparsek::cuda
