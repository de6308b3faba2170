// rotary: all parts of one launch token by token, so that a source which two parts read comes from memory once.
#include <algorithm>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/launch.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensABlock = 32;

// Both halves of kWidth channel pairs from column c on.
template <class T, int kWidth>
__device__ void add_rotated(const Rotation& r, int64_t row, int64_t token, int head, int half, int c, float* low,
                            float* high) {
  const T* x =
      static_cast<const T*>(r.x) + row * r.x_batch_stride + token * r.x_token_stride + head * r.x_head_stride + c;
  const Pack<T, kWidth> a = load<kWidth>(x), b = load<kWidth>(x + half);
  if (r.cos == nullptr) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      low[j] += widen(a.at[j]);
      high[j] += widen(b.at[j]);
    }
    return;
  }
  const int64_t at = row * r.angle_batch_stride + token * r.angle_token_stride + c;
  const Pack<float, kWidth> cos = load<kWidth>(r.cos + at), sin = load<kWidth>(r.sin + at);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float s = r.is_inverse ? -sin.at[j] : sin.at[j];
    low[j] += widen(a.at[j]) * cos.at[j] - widen(b.at[j]) * s;
    high[j] += widen(b.at[j]) * cos.at[j] + widen(a.at[j]) * s;
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryParams p) {
  const int half = p.head_dim / 2, packs = half / kWidth;
  const int64_t first_token = int64_t{blockIdx.x} * kTokensABlock, all_tokens = p.batch * p.tokens;
  const int tokens = static_cast<int>(min(int64_t{kTokensABlock}, all_tokens - first_token));
  for (int part = 0; part < p.num_parts; ++part) {
    const RotaryPart& to = p.parts[part];
    const int items = tokens * to.heads * packs;
    for (int i = threadIdx.x; i < items; i += kThreads) {
      const int c = i % packs * kWidth, head = i / packs % to.heads;
      const int64_t index = first_token + i / packs / to.heads;
      const int64_t row = p.batch == 1 ? 0 : index / p.tokens, token = index - row * p.tokens;
      float low[kWidth] = {}, high[kWidth] = {};
      add_rotated<T, kWidth>(to.first, row, token, head, half, c, low, high);
      if (to.second.x != nullptr) add_rotated<T, kWidth>(to.second, row, token, head, half, c, low, high);
      Pack<T, kWidth> a, b;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        a.at[j] = narrow<T>(low[j]);
        b.at[j] = narrow<T>(high[j]);
      }
      T* out = static_cast<T*>(to.out) + row * to.out_batch_stride + token * to.out_token_stride +
               head * to.out_head_stride + c;
      store(out, a);
      store(out + half, b);
    }
  }
}

bool is_vector(const Rotation& r, int width) {
  return all_aligned({r.x, r.cos, r.sin}, 16) &&
         all_multiples({r.x_batch_stride, r.x_token_stride, r.x_head_stride}, width) &&
         all_multiples({r.angle_batch_stride, r.angle_token_stride}, 4);
}

}  // namespace

void rotary(const RotaryParams& p, cudaStream_t stream) {
  constexpr int kWidth = 8;
  const int64_t tokens = p.batch * p.tokens;
  if (tokens == 0 || p.head_dim == 0) return;
  bool vector = p.head_dim / 2 % kWidth == 0;
  for (int i = 0; i < p.num_parts; ++i) {
    const RotaryPart& part = p.parts[i];
    vector = vector && is_vector(part.first, kWidth) && is_vector(part.second, kWidth) && all_aligned({part.out}, 16) &&
             all_multiples({part.out_batch_stride, part.out_token_stride, part.out_head_stride}, kWidth);
  }
  const auto blocks = static_cast<unsigned>((tokens + kTokensABlock - 1) / kTokensABlock);
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (vector) {
      rotary_kernel<T, kWidth><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      rotary_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    }
  });
  check_cuda(cudaGetLastError(), "rotary");
}

}  // namespace sparsek::cuda
