// Running statistics of eq. 1 along the sequence, chunk by chunk, for normalise.cu and normalise_backward.cu: they merge
// by Chan's rule in double.
#pragma once
#include "kernels/cuda/documents.cuh"
#include "kernels/params.h"

namespace sparsek::cuda::normalise {

constexpr int kThreads = 256, kEach = 4, kChunk = kThreads * kEach, kScanThreads = 1024;
constexpr double kEpsilon = 1e-5, kSlopePositions = 1024;

// Of a range of positions, from the last document's begin in it; `begins`: a document begins in the range.
struct Statistics {
  double count, mean, m2;
  int begins;
  __device__ static Statistics of(double raw, int begins) { return {1, raw, 0, begins}; }
};
__device__ __forceinline__ Statistics merged(const Statistics& before, const Statistics& after) {
  if (after.begins || before.count == 0) return {after.count, after.mean, after.m2, after.begins | before.begins};
  if (after.count == 0) return before;
  const double count = before.count + after.count, deviation = after.mean - before.mean, share = after.count / count;
  return {count, before.mean + deviation * share, before.m2 + after.m2 + deviation * deviation * before.count * share,
          before.begins};
}

struct Problem {
  NormaliseParams params;
  Statistics* chunks;  // [lanes, num_chunks] first the chunk's, then those of all before
  int num_chunks;
};

__device__ __forceinline__ float raw_score(const NormaliseParams& p, int lane, int i) {
  const Strides& s = p.raw_strides;
  return static_cast<const float*>(p.raw)[lane / p.num_kv_heads * s.batch + i * s.seq + lane % p.num_kv_heads * s.head];
}
__device__ __forceinline__ bool begins_document(const NormaliseParams& p, int i) {
  return p.cu_seqlens != nullptr && document_of(p.cu_seqlens, p.num_documents, p.seqlen, i).begin == i;
}

// Mean and m2 stay as given where no score is normalised.
__device__ __forceinline__ void write_statistics(const NormaliseParams& p, int lane, const Statistics& last,
                                                 const Statistics& given) {
  p.stats[int64_t{3} * lane] = last.count;
  p.stats[int64_t{3} * lane + 1] = p.timestep_norm ? last.mean : given.mean;
  p.stats[int64_t{3} * lane + 2] = p.timestep_norm ? last.m2 : given.m2;
}

// Inclusive, over the CTA's threads, by `merged`; `shared` has one place per thread.
template <int kCount, class T>
__device__ T inclusive(T own, T* shared) {
  shared[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kCount; step *= 2) {
    if (static_cast<int>(threadIdx.x) >= step) own = merged(shared[threadIdx.x - step], own);
    __syncthreads();
    shared[threadIdx.x] = own;
    __syncthreads();
  }
  return own;
}

// What a thread reads: its positions' raw scores, and which of them begin a document. Returns their statistics.
__device__ __forceinline__ Statistics read_positions(const NormaliseParams& p, int lane, int first,
                                                     float (&raw)[kEach], int (&begins)[kEach]) {
  Statistics own{0, 0, 0, 0};
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    if (first + n >= p.seqlen) break;
    raw[n] = raw_score(p, lane, first + n), begins[n] = begins_document(p, first + n);
    own = merged(own, Statistics::of(raw[n], begins[n]));
  }
  return own;
}

static __global__ void __launch_bounds__(kThreads) chunk_statistics_kernel(const __grid_constant__ Problem problem) {
  __shared__ Statistics shared[kThreads];
  float raw[kEach];
  int begins[kEach];
  const int c = blockIdx.x, lane = blockIdx.y;
  const Statistics own = read_positions(problem.params, lane, c * kChunk + threadIdx.x * kEach, raw, begins);
  const Statistics upto = inclusive<kThreads>(own, shared);
  if (threadIdx.x == kThreads - 1) problem.chunks[static_cast<int64_t>(lane) * problem.num_chunks + c] = upto;
}

// Statistics before each chunk, and behind the last if `stats` is given. One CTA per lane.
static __global__ void __launch_bounds__(kScanThreads) chunks_kernel(const __grid_constant__ Problem problem) {
  __shared__ Statistics shared[kScanThreads];
  const NormaliseParams& p = problem.params;
  const int lane = blockIdx.x;
  Statistics* chunks = problem.chunks + static_cast<int64_t>(lane) * problem.num_chunks;
  Statistics start{0, 0, 0, 0};
  const double* in = p.stats_in == nullptr || p.cu_seqlens != nullptr ? nullptr : p.stats_in + 3 * lane;
  if (in != nullptr) start = {in[0], in[1], in[2], 0};
  for (int base = 0; base < problem.num_chunks; base += kScanThreads) {
    const int c = base + threadIdx.x;
    const Statistics upto =
        inclusive<kScanThreads>(c < problem.num_chunks ? chunks[c] : Statistics{0, 0, 0, 0}, shared);
    if (c < problem.num_chunks) chunks[c] = threadIdx.x == 0 ? start : merged(start, shared[threadIdx.x - 1]);
    start = merged(start, shared[kScanThreads - 1]);
    __syncthreads();
  }
  // The last document may be empty.
  if (p.cu_seqlens != nullptr && p.cu_seqlens[p.num_documents - 1] >= p.seqlen) start = {0, 0, 0, 0};
  const Statistics given = in != nullptr ? Statistics{in[0], in[1], in[2], 0} : Statistics{0, 0, 0, 0};
  if (threadIdx.x == 0 && p.stats != nullptr) write_statistics(p, lane, start, given);
}

}  // namespace sparsek::cuda::normalise
