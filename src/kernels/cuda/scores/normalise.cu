// eq. 1 along the sequence: running statistics chunk by chunk (statistics.cuh), then the scores inside the chunks.
#include <cassert>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/scores/statistics.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

using namespace normalise;

// u of a position from its raw score and the statistics up to it.
__device__ __forceinline__ float eq1(const NormaliseParams& p, int head, float raw, const Statistics& running) {
  const double beta = static_cast<const float*>(p.beta)[head], gamma = static_cast<const float*>(p.gamma)[head];
  const double slope = static_cast<const float*>(p.slope)[head] / kSlopePositions;
  const double normalised =
      p.timestep_norm ? (raw - running.mean) / sqrt(running.m2 / running.count + kEpsilon) : raw;
  return static_cast<float>(beta + gamma * normalised + slope * (running.count - 1));
}

__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ Problem problem) {
  __shared__ Statistics shared[kThreads];
  const NormaliseParams& p = problem.params;
  const int c = blockIdx.x, lane = blockIdx.y, head = lane % p.num_kv_heads, first = c * kChunk + threadIdx.x * kEach;
  float raw[kEach];
  int begins[kEach];
  inclusive<kThreads>(read_positions(p, lane, first, raw, begins), shared);
  Statistics running = problem.chunks[static_cast<int64_t>(lane) * problem.num_chunks + c];
  if (threadIdx.x > 0) running = merged(running, shared[threadIdx.x - 1]);
  for (int n = 0; n < kEach; ++n) {
    if (first + n >= p.seqlen) break;
    running = merged(running, Statistics::of(raw[n], begins[n]));
    const Strides& s = p.scores_strides;
    static_cast<float*>(p.scores)[lane / p.num_kv_heads * s.batch + (first + n) * s.seq + head * s.head] =
        eq1(p, head, raw[n], running);
  }
}

// The whole of eq. 1 for one position behind carried statistics, a thread per lane: a decoding step has no sequence to
// scan, and three launches with their scans took a third of a small model's layer. stats may be stats_in.
__global__ void __launch_bounds__(kThreads) one_position_kernel(const __grid_constant__ NormaliseParams p) {
  const int lane = blockIdx.x * kThreads + threadIdx.x, head = lane % p.num_kv_heads;
  if (lane >= p.batch * p.num_kv_heads) return;
  const double* const in = p.stats_in == nullptr ? nullptr : p.stats_in + int64_t{3} * lane;
  const Statistics before = in == nullptr ? Statistics{0, 0, 0, 0} : Statistics{in[0], in[1], in[2], 0};
  const float raw = raw_score(p, lane, 0);
  const Statistics running = merged(before, Statistics::of(raw, 0));
  const Strides& s = p.scores_strides;
  static_cast<float*>(p.scores)[lane / p.num_kv_heads * s.batch + head * s.head] = eq1(p, head, raw, running);
  if (p.stats != nullptr) write_statistics(p, lane, running, before);
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
  const unsigned lanes = params.batch * params.num_kv_heads;
  if (params.seqlen == 1 && params.cu_seqlens == nullptr) {
    one_position_kernel<<<(lanes + kThreads - 1) / kThreads, kThreads, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "normalise_scores");
    return;
  }
  Problem problem{params, nullptr, 0};
  carve(problem, workspace);
  const dim3 grid(problem.num_chunks, lanes);
  chunk_statistics_kernel<<<grid, kThreads, 0, stream>>>(problem);
  chunks_kernel<<<lanes, kScanThreads, 0, stream>>>(problem);
  scores_kernel<<<grid, kThreads, 0, stream>>>(problem);
  check_cuda(cudaGetLastError(), "normalise_scores");
}

}  // namespace sparsek::cuda
