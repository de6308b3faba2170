// cross_entropy: a block a row. The first pass keeps a running maximum and sum (online softmax), the second writes the
// gradient; of two blocks a multiprocessor the rows lie in the L2 cache between the passes (96 KB each at 49,152
// elements, 25 MB on 132 multiprocessors).
#include <cmath>
#include <limits>

#include "kernels/cuda/cross_entropy/cross_entropy.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/launch.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Sums of exp(x - max): alone (sum), and each times a value (weighted).
struct Running {
  float max, sum, weighted;

  __device__ void raise(float to) {
    if (!(to > max)) return;
    const float scale = __expf(max - to);
    sum *= scale;
    weighted *= scale;
    max = to;
  }
  __device__ void add(float x, float value) {
    if (x == kNothing) return;  // whatever the maximum: it may be that too
    const float e = __expf(x - max);
    sum += e;
    weighted += e * value;
  }
  // All of `x`, value(j) with element j.
  template <class T, int kWidth, class Value>
  __device__ void take(const Pack<T, kWidth>& x, Value value) {
    float top = widen(x.at[0]);
#pragma unroll
    for (int j = 1; j < kWidth; ++j) top = fmaxf(top, widen(x.at[j]));
    raise(top);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) add(widen(x.at[j]), value(j));
  }
  // The same bits whichever way round: without contraction.
  __device__ void merge(const Running& other) {
    const float top = fmaxf(max, other.max);
    if (top == kNothing) {
      sum += other.sum;  // 0, or NaN of logits that are
      return;
    }
    const float mine = __expf(max - top), others = __expf(other.max - top);
    sum = __fadd_rn(__fmul_rn(sum, mine), __fmul_rn(other.sum, others));
    weighted = __fadd_rn(__fmul_rn(weighted, mine), __fmul_rn(other.weighted, others));
    max = top;
  }
};

__device__ Running block_merge(Running r, Running* partial) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    r.merge({__shfl_xor_sync(0xffffffffu, r.max, step), __shfl_xor_sync(0xffffffffu, r.sum, step),
             __shfl_xor_sync(0xffffffffu, r.weighted, step)});
  }
  __syncthreads();  // the row before has read partial
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = r;
  __syncthreads();
  r = partial[threadIdx.x % 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    r.merge({__shfl_xor_sync(0xffffffffu, r.max, step), __shfl_xor_sync(0xffffffffu, r.sum, step),
             __shfl_xor_sync(0xffffffffu, r.weighted, step)});
  }
  return r;
}

template <class T, int kWidth, bool kTeacher>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const __grid_constant__ CrossEntropyParams p) {
  static_assert(kWarps == 32, "block_merge reads a partial result a lane");
  __shared__ Running partial[2][kWarps];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    T* logits = static_cast<T*>(p.logits) + row * p.vocab_size;
    const T* teacher = kTeacher ? static_cast<const T*>(p.teacher) + row * p.vocab_size : nullptr;
    const int64_t target = p.targets[row];
    if (target == p.ignored) {
      if (threadIdx.x == 0) {
        p.losses[row] = 0.0f;
        if (kTeacher) p.divergences[row] = 0.0f;
      }
      if (!p.writes_gradient) continue;
      Pack<T, kWidth> zero;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) zero.at[j] = narrow<T>(0.0f);
      for (int c = threadIdx.x * kWidth; c < p.vocab_size; c += kThreads * kWidth) store(logits + c, zero);
      continue;
    }
    Running own{kNothing, 0.0f, 0.0f}, other = own;
    for (int c = threadIdx.x * kWidth; c < p.vocab_size; c += kThreads * kWidth) {
      const Pack<T, kWidth> x = load<kWidth>(logits + c);
      own.take(x, [](int) { return 0.0f; });
      if constexpr (kTeacher) {
        const Pack<T, kWidth> y = load<kWidth>(teacher + c);
        other.take(y, [&](int j) { return widen(y.at[j]) - widen(x.at[j]); });
      }
    }
    own = block_merge(own, partial[0]);
    const float lse = own.max + logf(own.sum);
    float lse_teacher = 0.0f;
    if constexpr (kTeacher) {
      other = block_merge(other, partial[1]);
      lse_teacher = other.max + logf(other.sum);
    }
    const bool is_inside = target >= 0 && target < p.vocab_size;
    const float unknown = is_inside ? 0.0f : nanf("");  // poisons what a wrong target would make
    if (threadIdx.x == 0) {
      p.losses[row] = (is_inside ? lse - widen(logits[target]) : 0.0f) + unknown;
      if constexpr (kTeacher) p.divergences[row] = other.weighted / other.sum - lse_teacher + lse;
    }
    if (!p.writes_gradient) continue;
    __syncthreads();  // the target's logit has been read
    const float weight = p.next_token_weight + (kTeacher ? p.kl_weight : 0.0f) + unknown;
    for (int c = threadIdx.x * kWidth; c < p.vocab_size; c += kThreads * kWidth) {
      const Pack<T, kWidth> x = load<kWidth>(logits + c);
      float gradient[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        gradient[j] = weight * __expf(widen(x.at[j]) - lse);
        if (c + j == target) gradient[j] -= p.next_token_weight;
      }
      if constexpr (kTeacher) {
        const Pack<T, kWidth> y = load<kWidth>(teacher + c);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) gradient[j] -= p.kl_weight * __expf(widen(y.at[j]) - lse_teacher);
      }
      Pack<T, kWidth> rounded;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) rounded.at[j] = narrow<T>(gradient[j]);
      store(logits + c, rounded);
    }
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
  constexpr int kWidth = 8;
  if (p.rows == 0 || p.vocab_size == 0) return;
  constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // beyond, blocks take several rows
  const auto blocks = static_cast<int>(p.rows < kMaxBlocks ? p.rows : kMaxBlocks);
  const bool vector = p.vocab_size % kWidth == 0 && all_aligned({p.logits, p.teacher}, 16);
  dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto kernel) { kernel<<<blocks, kThreads, 0, stream>>>(p); };
    if (p.teacher != nullptr) {
      vector ? launch(cross_entropy_kernel<T, kWidth, true>) : launch(cross_entropy_kernel<T, 1, true>);
    } else {
      vector ? launch(cross_entropy_kernel<T, kWidth, false>) : launch(cross_entropy_kernel<T, 1, false>);
    }
  });
  check_cuda(cudaGetLastError(), "cross_entropy");
}

}  // namespace sparsek::cuda
