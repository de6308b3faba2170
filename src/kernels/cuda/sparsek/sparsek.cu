// eq. 2 by rows, one CTA each. f(tau) = sum of clamp(z - tau, 0, 1) - k falls piece by piece on straight lines; on the
// piece of a guess the closed form gives the next one (Newton's step), and a bracket with bisection holds what is not
// convex. A guess that its own piece reproduces is the root. Residuals z - tau are summed about the guess, in double:
// the smaller they get the more exact, so that a root where the fractional set runs empty is met exactly and the flat
// piece behind it is seen.
#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/cuda/shared_memory.h"
#include "kernels/cuda/sparsek/sparsek.h"

namespace sparsek::cuda {
namespace {

constexpr int kMostThreads = 1024, kCachedBytes = 96 * 1024, kNewtonSteps = 6, kMostSteps = 160;
static_assert(kCachedBytes + 2048 <= kPortableSharedBytes);  // beside what the kernel has by itself

__host__ __device__ constexpr int threads_for(int64_t columns) {
  return columns <= 1024 ? 128 : columns <= 8192 ? 256 : kMostThreads;
}

// Every thread gets the result; `shared` has a place per warp.
template <class T, class Merge>
__device__ T over_block(T own, T* shared, Merge&& merge) {
  const int warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) own = merge(own, own.from_lane(threadIdx.x % 32 ^ step));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  T all = shared[0];
  for (int w = 1; w < warps; ++w) all = merge(all, shared[w]);
  __syncthreads();
  return all;
}

struct Range {
  double least, most;
  int is_finite;
  __device__ Range from_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, least, lane), __shfl_sync(0xffffffffu, most, lane),
            __shfl_sync(0xffffffffu, is_finite, lane)};
  }
};

// A guess tau: how many z have p = 1 and the least of them, how many a fraction and the sum of those.
struct Piece {
  double fractions, least_one;
  int64_t num_ones, num_fractions;
  __device__ Piece from_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, fractions, lane), __shfl_sync(0xffffffffu, least_one, lane),
            __shfl_sync(0xffffffffu, num_ones, lane), __shfl_sync(0xffffffffu, num_fractions, lane)};
  }
};

template <class T>
__device__ Piece piece_at(const T* z, int64_t columns, double tau, Piece* shared) {
  Piece own{0, INFINITY, 0, 0};
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < columns; n += blockDim.x) {
    const double x = z[n], p = x - tau;
    if (p >= 1) {
      ++own.num_ones, own.least_one = fmin(own.least_one, x);
    } else if (p > 0) {
      ++own.num_fractions, own.fractions += p;
    }
  }
  return over_block(own, shared, [](const Piece& a, const Piece& b) {
    return Piece{a.fractions + b.fractions, fmin(a.least_one, b.least_one), a.num_ones + b.num_ones,
                 a.num_fractions + b.num_fractions};
  });
}

// The largest root in [low, high): f(low) >= 0 > f(high). Every thread computes the same.
template <class T>
__device__ double largest_root(const T* z, int64_t columns, int64_t k, double low, double high, Piece* shared) {
  double tau = low + (high - low) / 2;
  int64_t ones_before = -1, fractions_before = -1;
#pragma unroll 1
  for (int step = 0; step < kMostSteps; ++step) {
    const Piece piece = piece_at(z, columns, tau, shared);
    if (piece.num_fractions == 0 && piece.num_ones == k) return piece.least_one - 1;
    const double excess = piece.fractions + static_cast<double>(piece.num_ones - k);
    (excess >= 0 ? low : high) = tau;
    const double middle = low + (high - low) / 2;
    double next = middle;
    if (piece.num_fractions > 0) {
      next = tau + excess / static_cast<double>(piece.num_fractions);
      if (next == tau) return next;
      // The same piece again, and only rounding moves the guess. Not where k values are ones: then the root is where
      // the fractions vanish, and the flat piece behind it must be seen.
      const bool is_settled = piece.num_ones == ones_before && piece.num_fractions == fractions_before &&
                              fabs(next - tau) <= 1e-15 * fmax(1.0, fabs(tau));
      if (is_settled && piece.num_ones != k) return next;
      if (!(next > low && next < high) || (step >= kNewtonSteps && step % 2 == 0)) next = middle;
    }
    if (next == tau || next == high) return low;  // no number is left between them
    tau = next, ones_before = piece.num_ones, fractions_before = piece.num_fractions;
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) sparsek_kernel(const __grid_constant__ SparsekParams params,
                                                               bool is_cached) {
  __shared__ union {
    Range range[kMostThreads / 32];
    Piece piece[kMostThreads / 32];
  } shared;
  extern __shared__ __align__(16) uint8_t memory[];
  T* const cache = reinterpret_cast<T*>(memory);
  const int64_t columns = params.columns;
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* z = static_cast<const T*>(params.z) + row * columns;
    T* const p = static_cast<T*>(params.p) + row * columns;
    Range own{INFINITY, -INFINITY, 1};
    for (int64_t n = threadIdx.x; n < columns; n += blockDim.x) {
      const T x = z[n];
      if (is_cached) cache[n] = x;
      const double value = x;
      own = {fmin(own.least, value), fmax(own.most, value), own.is_finite & (isfinite(value) ? 1 : 0)};
    }
    const Range range = over_block(own, shared.range, [](const Range& a, const Range& b) {
      return Range{fmin(a.least, b.least), fmax(a.most, b.most), a.is_finite & b.is_finite};
    });
    if (is_cached) z = cache;
    double root = -INFINITY;
    if (!range.is_finite) {
      root = NAN;
    } else if (columns > params.k) {
      root = largest_root(z, columns, params.k, range.least - 1, range.most, shared.piece);
    }
    const T tau = static_cast<T>(root);
    if (threadIdx.x == 0) static_cast<T*>(params.tau)[row] = tau;
    for (int64_t n = threadIdx.x; n < columns; n += blockDim.x) {
      const T x = z[n] - tau;
      p[n] = isnan(x) ? x : x < 0 ? 0 : x > 1 ? 1 : x;
    }
    __syncthreads();
  }
}

struct Mean {
  double sum;
  int64_t count;
  __device__ Mean from_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, sum, lane), __shfl_sync(0xffffffffu, count, lane)};
  }
};

template <class T>
__global__ void __launch_bounds__(kMostThreads) sparsek_backward_kernel(const __grid_constant__ SparsekBwdParams params) {
  __shared__ Mean shared[kMostThreads / 32];
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* const p = static_cast<const T*>(params.p) + row * params.columns;
    const T* const dp = static_cast<const T*>(params.dp) + row * params.columns;
    T* const dz = static_cast<T*>(params.dz) + row * params.columns;
    Mean own{0, 0};
    for (int64_t n = threadIdx.x; n < params.columns; n += blockDim.x) {
      if (p[n] > 0 && p[n] < 1) own.sum += static_cast<double>(dp[n]), ++own.count;
    }
    const Mean all = over_block(own, shared, [](const Mean& a, const Mean& b) {
      return Mean{a.sum + b.sum, a.count + b.count};
    });
    const T mean = static_cast<T>(all.sum / static_cast<double>(all.count > 0 ? all.count : 1));
    for (int64_t n = threadIdx.x; n < params.columns; n += blockDim.x) {
      dz[n] = p[n] > 0 && p[n] < 1 ? dp[n] - mean : T{0};
    }
  }
}

template <class T>
void launch(const SparsekParams& params, cudaStream_t stream) {
  const bool is_cached = params.columns <= kCachedBytes / static_cast<int64_t>(sizeof(T));
  const int memory = is_cached ? static_cast<int>(params.columns * sizeof(T)) : 0;
  if (memory > 32 * 1024) allow_shared_bytes(sparsek_kernel<T>, kCachedBytes);
  const auto rows = static_cast<unsigned>(std::min<int64_t>(params.rows, INT32_MAX));
  sparsek_kernel<T><<<rows, threads_for(params.columns), memory, stream>>>(params, is_cached);
  check_cuda(cudaGetLastError(), "sparsek");
}

template <class T>
void launch_backward(const SparsekBwdParams& params, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(std::min<int64_t>(params.rows, INT32_MAX));
  sparsek_backward_kernel<T><<<rows, threads_for(params.columns), 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "sparsek_backward");
}

}  // namespace

void sparsek(const SparsekParams& params, cudaStream_t stream) {
  assert((params.dtype == DType::kF32 || params.dtype == DType::kF64) && params.k >= 1);
  if (params.rows == 0 || params.columns == 0) return;
  params.dtype == DType::kF64 ? launch<double>(params, stream) : launch<float>(params, stream);
}

void sparsek_backward(const SparsekBwdParams& params, cudaStream_t stream) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  if (params.rows == 0 || params.columns == 0) return;
  params.dtype == DType::kF64 ? launch_backward<double>(params, stream) : launch_backward<float>(params, stream);
}

}  // namespace sparsek::cuda
