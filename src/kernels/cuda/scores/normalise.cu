// eq. 1 along the sequence: running statistics chunk by chunk (statistics.cuh), then the scores inside the chunks.
#include <cassert>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/scores/statistics.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

using namespace normalise;

__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ Problem problem) {
  __shared__ Statistics shared[kThreads];
  const NormaliseParams& p = problem.params;
  const int c = blockIdx.x, lane = blockIdx.y, head = lane % p.num_kv_heads, first = c * kChunk + threadIdx.x * kEach;
  float raw[kEach];
  int begins[kEach];
  inclusive<kThreads>(read_positions(p, lane, first, raw, begins), shared);
  Statistics running = problem.chunks[static_cast<int64_t>(lane) * problem.num_chunks + c];
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
  chunk_statistics_kernel<<<grid, kThreads, 0, stream>>>(problem);
  chunks_kernel<<<lanes, kScanThreads, 0, stream>>>(problem);
  scores_kernel<<<grid, kThreads, 0, stream>>>(problem);
  check_cuda(cudaGetLastError(), "normalise_scores");
}

}  // namespace sparsek::cuda
