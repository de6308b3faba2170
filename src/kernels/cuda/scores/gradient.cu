// eq. 11: du_j = H_j - (C[b_j] - C[a_j]), C the prefix sum of mbar in double. |F_i| is counted from the intervals.
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256, kEach = 4, kChunk = kThreads * kEach;

struct Work {
  int32_t* change;        // [lanes, seqlen] of |F| at a query
  int32_t* chunk_change;  // [lanes, num_chunks]
  double* mass;           // [lanes, seqlen + 1] sum of mbar over the chunk's queries before
  double* chunk_mass;     // [lanes, num_chunks + 1] first the chunk's, then the sum of those before
  int num_chunks;
};

int64_t carve(const ScoreGradientParams& params, void* workspace, Work& work) {
  work.num_chunks = (params.seqlen_q + kChunk - 1) / kChunk;
  const int64_t lanes = params.lanes;
  Carver carver(workspace);
  carver.take(work.change, lanes * params.seqlen_q);
  carver.take(work.chunk_change, lanes * work.num_chunks);
  carver.take(work.mass, lanes * (params.seqlen_q + 1));
  carver.take(work.chunk_mass, lanes * (work.num_chunks + 1));
  return carver.used_bytes();
}

__device__ __forceinline__ int2 interval(const ScoreGradientParams& p, int64_t row) {
  return {min(max(p.frac_begin[row], 0), p.seqlen_q), min(max(p.frac_end[row], 0), p.seqlen_q)};
}

__global__ void __launch_bounds__(kThreads) zero_kernel(int32_t* change, int64_t count) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < count) change[i] = 0;
}

__global__ void __launch_bounds__(kThreads) mark_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int j = blockIdx.x * kThreads + threadIdx.x, rows = p.num_pool_rows + p.seqlen_k;
  if (j >= rows) return;
  const int64_t lane = blockIdx.y;
  const int2 x = interval(p, lane * rows + j);
  if (x.x >= x.y) return;
  atomicAdd(&w.change[lane * p.seqlen_q + x.x], 1);
  if (x.y < p.seqlen_q) atomicAdd(&w.change[lane * p.seqlen_q + x.y], -1);
}

// The sum over the CTA's threads before this one, and over all of them.
template <class T>
__device__ T exclusive_sum(T own, T* warp_sums, T& total) {
  T sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, step);
    if ((threadIdx.x & 31) >= step) sum += other;
  }
  if ((threadIdx.x & 31) == 31) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  T before = sum - own;
  total = 0;
  for (int n = 0; n < kThreads / 32; ++n) {
    if (n < static_cast<int>(threadIdx.x / 32)) before += warp_sums[n];
    total += warp_sums[n];
  }
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(kThreads) chunk_change_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ int warp_sums[kThreads / 32];
  const int64_t lane = blockIdx.y;
  int own = 0, total;
  for (int n = 0; n < kEach; ++n) {
    const int i = blockIdx.x * kChunk + n * kThreads + threadIdx.x;
    if (i < p.seqlen_q) own += w.change[lane * p.seqlen_q + i];
  }
  exclusive_sum(own, warp_sums, total);
  if (threadIdx.x == 0) w.chunk_change[lane * w.num_chunks + blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) mass_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ int warp_counts[kThreads / 32];
  __shared__ double warp_sums[kThreads / 32];
  const int64_t lane = blockIdx.y;
  const int c = blockIdx.x, first = c * kChunk + threadIdx.x * kEach;
  int earlier = 0, unused;
  for (int n = threadIdx.x; n < c; n += kThreads) earlier += w.chunk_change[lane * w.num_chunks + n];
  int start;
  exclusive_sum(earlier, warp_counts, start);
  int change[kEach], own = 0;
  for (int n = 0; n < kEach; ++n) {
    change[n] = first + n < p.seqlen_q ? w.change[lane * p.seqlen_q + first + n] : 0;
    own += change[n];
  }
  int fractional = start + exclusive_sum(own, warp_counts, unused);  // |F|
  double mean[kEach], sum = 0, total;
  for (int n = 0; n < kEach; ++n) {
    fractional += change[n];
    mean[n] = first + n < p.seqlen_q && fractional > 0
                  ? static_cast<double>(p.h_query[lane * p.seqlen_q + first + n]) / fractional
                  : 0.0;
    sum += mean[n];
  }
  double before = exclusive_sum(sum, warp_sums, total);
  for (int n = 0; n < kEach; ++n) {
    if (first + n <= p.seqlen_q) w.mass[lane * (p.seqlen_q + 1) + first + n] = before;
    before += mean[n];
  }
  // The place behind the last query begins a chunk of its own where the length is a multiple of the chunk's.
  if (threadIdx.x == 0 && (c + 1) * kChunk == p.seqlen_q) w.mass[lane * (p.seqlen_q + 1) + p.seqlen_q] = 0;
  if (threadIdx.x == 0) w.chunk_mass[lane * (w.num_chunks + 1) + c] = total;
}

// One CTA per lane.
__global__ void __launch_bounds__(kThreads) chunk_mass_kernel(const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ double warp_sums[kThreads / 32];
  double* mass = w.chunk_mass + static_cast<int64_t>(blockIdx.x) * (w.num_chunks + 1);
  double start = 0;
  for (int base = 0; base <= w.num_chunks; base += kThreads) {
    const int c = base + threadIdx.x;
    double total;
    const double before = exclusive_sum(c < w.num_chunks ? mass[c] : 0.0, warp_sums, total);
    if (c <= w.num_chunks) mass[c] = start + before;
    start += total;
  }
}

__global__ void __launch_bounds__(kThreads) gradient_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int j = blockIdx.x * kThreads + threadIdx.x, rows = p.num_pool_rows + p.seqlen_k;
  if (j >= rows) return;
  const int64_t lane = blockIdx.y;
  const int2 x = interval(p, lane * rows + j);
  const auto mass_before = [&](int i) {
    return w.chunk_mass[lane * (w.num_chunks + 1) + i / kChunk] + w.mass[lane * (p.seqlen_q + 1) + i];
  };
  float gradient = 0;
  if (x.x < x.y) {
    const double own = j < p.num_pool_rows ? 0.0 : p.h_key[lane * p.seqlen_k + j - p.num_pool_rows];
    gradient = static_cast<float>(own - (mass_before(x.y) - mass_before(x.x)));
  }
  p.dscores[lane * rows + j] = gradient;
}

}  // namespace

int64_t score_gradient_workspace_bytes(const ScoreGradientParams& params) {
  Work work;
  return carve(params, nullptr, work);
}

void score_gradient(const ScoreGradientParams& params, void* workspace, cudaStream_t stream) {
  Work work;
  carve(params, workspace, work);
  const int64_t lanes = params.lanes;
  const dim3 keys((params.num_pool_rows + params.seqlen_k + kThreads - 1) / kThreads, lanes),
      chunks(work.num_chunks, lanes);
  const int64_t queries = lanes * params.seqlen_q;
  launch_behind(zero_kernel, (queries + kThreads - 1) / kThreads, kThreads, 0, stream, work.change, queries);
  launch_behind(mark_kernel, keys, kThreads, 0, stream, params, work);
  launch_behind(chunk_change_kernel, chunks, kThreads, 0, stream, params, work);
  launch_behind(mass_kernel, chunks, kThreads, 0, stream, params, work);
  launch_behind(chunk_mass_kernel, lanes, kThreads, 0, stream, work);
  launch_behind(gradient_kernel, keys, kThreads, 0, stream, params, work);
  check_cuda(cudaGetLastError(), "score_gradient");
}

}  // namespace sparsek::cuda
