// eq. 11: du_j = H_j - (C[b_j] - C[a_j]), C the prefix sum of mbar in double. |F_i| is counted from the intervals.
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256, kEach = 4, kChunk = kThreads * kEach;

struct Work {
  int32_t* change;        // [lanes, seqlen] of |F| at a query; it and the next two are one array, zeroed first
  int32_t* chunk_change;  // [lanes, num_chunks]
  int32_t* chunks_done;   // [lanes] whose chunk_mass is there
  double* mass;           // [lanes, seqlen + 1] sum of mbar over the chunk's queries before
  double* chunk_mass;     // [lanes, num_chunks + 1] first the chunk's, then the sum of those before
  int num_chunks;
};

int64_t num_zeroed(const ScoreGradientParams& params, const Work& work) {
  return params.lanes * (int64_t{params.seqlen_q} + work.num_chunks + 1);
}

int64_t carve(const ScoreGradientParams& params, void* workspace, Work& work) {
  work.num_chunks = (params.seqlen_q + kChunk - 1) / kChunk;
  const int64_t lanes = params.lanes;
  Carver carver(workspace);
  carver.take(work.change, num_zeroed(params, work));
  work.chunk_change = work.change + lanes * params.seqlen_q;
  work.chunks_done = work.chunk_change + lanes * work.num_chunks;
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

// *(at + chunk) += value for every valid lane: few chunks get the additions of many keys, so one a warp and chunk.
__device__ void add_to_chunk(int32_t* at, int chunk, int value, bool valid) {
  const uint32_t same = __match_any_sync(0xffffffffu, valid ? chunk : -1);
  if (valid && static_cast<int>(threadIdx.x & 31) == __ffs(same) - 1) atomicAdd(at + chunk, value * __popc(same));
}

__global__ void __launch_bounds__(kThreads) mark_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int j = blockIdx.x * kThreads + threadIdx.x, rows = p.num_pool_rows + p.seqlen_k;
  const int64_t lane = blockIdx.y;
  const int2 x = j < rows ? interval(p, lane * rows + j) : int2{0, 0};
  const bool begins = x.x < x.y, ends = begins && x.y < p.seqlen_q;
  if (begins) atomicAdd(&w.change[lane * p.seqlen_q + x.x], 1);
  if (ends) atomicAdd(&w.change[lane * p.seqlen_q + x.y], -1);
  add_to_chunk(w.chunk_change + lane * w.num_chunks, x.x / kChunk, 1, begins);
  add_to_chunk(w.chunk_change + lane * w.num_chunks, x.y / kChunk, -1, ends);
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

// chunk_mass of a lane from each chunk's sum to the sum of those before.
__device__ void sum_chunks(const Work& w, int64_t lane, double* warp_sums) {
  double* mass = w.chunk_mass + lane * (w.num_chunks + 1);
  double start = 0;
  for (int base = 0; base <= w.num_chunks; base += kThreads) {
    const int c = base + threadIdx.x;
    double total;
    const double before = exclusive_sum(c < w.num_chunks ? __ldcg(mass + c) : 0.0, warp_sums, total);
    if (c <= w.num_chunks) mass[c] = start + before;
    start += total;
  }
}

// A CTA per chunk; a lane's last one sums its chunks.
__global__ void __launch_bounds__(kThreads) mass_kernel(const ScoreGradientParams p, const Work w) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ int warp_counts[kThreads / 32];
  __shared__ double warp_sums[kThreads / 32];
  __shared__ bool is_last;
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
  if (threadIdx.x == 0) {
    w.chunk_mass[lane * (w.num_chunks + 1) + c] = total;
    __threadfence();
    is_last = atomicAdd(&w.chunks_done[lane], 1) == w.num_chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) sum_chunks(w, lane, warp_sums);
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
  const int64_t zeroed = num_zeroed(params, work);
  launch_behind(zero_kernel, (zeroed + kThreads - 1) / kThreads, kThreads, 0, stream, work.change, zeroed);
  launch_behind(mark_kernel, keys, kThreads, 0, stream, params, work);
  launch_behind(mass_kernel, chunks, kThreads, 0, stream, params, work);
  launch_behind(gradient_kernel, keys, kThreads, 0, stream, params, work);
  check_cuda(cudaGetLastError(), "score_gradient");
}

}  // namespace sparsek::cuda
