// eq. 1 along the sequence: running statistics merge by Chan's rule in double, chunk by chunk, then inside the chunks.
#include <cassert>

#include "kernels/cuda/documents.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

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

// Inclusive, over the CTA's threads; `shared` has one place per thread.
template <int kCount>
__device__ Statistics inclusive(Statistics own, Statistics* shared) {
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

// Pass 0: the chunk's statistics. Pass 1: the scores.
template <int kPass>
__global__ void __launch_bounds__(kThreads) positions_kernel(const __grid_constant__ Problem problem) {
  __shared__ Statistics shared[kThreads];
  const NormaliseParams& p = problem.params;
  const int c = blockIdx.x, lane = blockIdx.y, head = lane % p.num_kv_heads, first = c * kChunk + threadIdx.x * kEach;
  float raw[kEach];
  int begins[kEach];
  Statistics own{0, 0, 0, 0};
  for (int n = 0; n < kEach; ++n) {
    if (first + n >= p.seqlen) break;
    raw[n] = raw_score(p, lane, first + n), begins[n] = begins_document(p, first + n);
    own = merged(own, Statistics::of(raw[n], begins[n]));
  }
  const Statistics upto = inclusive<kThreads>(own, shared);
  Statistics* chunk = problem.chunks + static_cast<int64_t>(lane) * problem.num_chunks + c;
  if (kPass == 0) {
    if (threadIdx.x == kThreads - 1) *chunk = upto;
    return;
  }
  Statistics running = *chunk;
  if (threadIdx.x > 0) running = merged(running, shared[threadIdx.x - 1]);
  const double beta = static_cast<const float*>(p.beta)[head], gamma = static_cast<const float*>(p.gamma)[head];
  const double slope = static_cast<const float*>(p.slope)[head] / kSlopePositions;
  for (int n = 0; n < kEach; ++n) {
    if (first + n >= p.seqlen) break;
    running = merged(running, Statistics::of(raw[n], begins[n]));
    const double normalised =
        p.timestep_norm ? (raw[n] - running.mean) / sqrt(running.m2 / running.count + kEpsilon) : raw[n];
    const Strides& s = p.scores_strides;
    static_cast<float*>(p.scores)[lane / p.num_kv_heads * s.batch + (first + n) * s.seq + head * s.head] =
        static_cast<float>(beta + gamma * normalised + slope * (running.count - 1));
  }
}

// Statistics before each chunk, and behind the last. One CTA per lane.
__global__ void __launch_bounds__(kScanThreads) chunks_kernel(const __grid_constant__ Problem problem) {
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
  if (threadIdx.x == 0) {
    p.stats[3 * lane] = start.count;
    p.stats[3 * lane + 1] = p.timestep_norm ? start.mean : in != nullptr ? in[1] : 0;
    p.stats[3 * lane + 2] = p.timestep_norm ? start.m2 : in != nullptr ? in[2] : 0;
  }
}

int64_t carve(Problem& problem, void* workspace) {
  problem.num_chunks = (problem.params.seqlen + kChunk - 1) / kChunk;
  Carver carver(workspace);
  carver.take(problem.chunks, int64_t{problem.params.batch} * problem.params.num_kv_heads * problem.num_chunks);
  return carver.used_bytes();
}

}  // namespace

int64_t normalise_scores_workspace_bytes(const NormaliseParams& params) {
  Problem problem{params, nullptr, 0};
  return carve(problem, nullptr);
}

void normalise_scores(const NormaliseParams& params, void* workspace, cudaStream_t stream) {
  assert(params.dtype == DType::kF32 && (params.cu_seqlens == nullptr || params.batch == 1));
  Problem problem{params, nullptr, 0};
  carve(problem, workspace);
  const unsigned lanes = params.batch * params.num_kv_heads;
  const dim3 grid(problem.num_chunks, lanes);
  positions_kernel<0><<<grid, kThreads, 0, stream>>>(problem);
  chunks_kernel<<<lanes, kScanThreads, 0, stream>>>(problem);
  positions_kernel<1><<<grid, kThreads, 0, stream>>>(problem);
  check_cuda(cudaGetLastError(), "normalise_scores");
}

}  // namespace sparsek::cuda
