// The gradient of eq. 1 through the running statistics. With d_j the gradient of u_j times gamma, i_j the inverse
// standard deviation and n_j the count behind position j of a document, every later position adds to an earlier one:
//   draw_t = d_t i_t + sum over j >= t of ( A_j + 2 B_j (r_t - mean_j) ),
//   A_j = -d_j i_j / n_j  (through mean_j),  B_j = -d_j (r_j - mean_j) i_j^3 / (2 n_j)  (through M2_j).
// So three sums over what comes later, A, B and B (mean_j - r_0), suffice; they are scanned from the end, as the
// statistics are from the start. The gradients of the statistics behind the last position enter like a term of it.
#include <cassert>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/scores/statistics.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

using namespace normalise;

// Sums over a range of positions, from its first to the first end of a document in it; `ends`: there is one.
struct Later {
  double a, b, b_mean;
  int ends;
};
__device__ __forceinline__ Later merged(const Later& x, const Later& behind) {
  if (x.ends) return x;
  return {x.a + behind.a, x.b + behind.b, x.b_mean + behind.b_mean, behind.ends};
}

// Of beta, gamma and slope.
struct Sums {
  double beta, gamma, slope;
};
__device__ __forceinline__ Sums merged(const Sums& x, const Sums& y) {
  return {x.beta + y.beta, x.gamma + y.gamma, x.slope + y.slope};
}

struct Backward {
  NormaliseBwdParams params;
  Problem forward;
  Later* chunks;      // [lanes, num_chunks] first the chunk's, then that of all behind it
  Sums *chunk_sums;   // [lanes, num_chunks]
  Sums *lane_sums;    // [lanes]
};

// Inclusive from the last thread to the first; `shared` has one place per thread.
template <int kCount, class T>
__device__ T inclusive_from_end(T own, T* shared) {
  shared[threadIdx.x] = own;
  __syncthreads();
  for (int step = 1; step < kCount; step *= 2) {
    if (static_cast<int>(threadIdx.x) + step < kCount) own = merged(own, shared[threadIdx.x + step]);
    __syncthreads();
    shared[threadIdx.x] = own;
    __syncthreads();
  }
  return own;
}

__device__ __forceinline__ float score_gradient(const NormaliseBwdParams& p, int lane, int i) {
  const Strides& s = p.dscores_strides;
  const int heads = p.fwd.num_kv_heads;
  return static_cast<const float*>(p.dscores)[lane / heads * s.batch + i * s.seq + lane % heads * s.head];
}

// Pass 0: the chunk's sums. Pass 1: draw.
template <int kPass>
__global__ void __launch_bounds__(kThreads) terms_kernel(const __grid_constant__ Backward backward) {
  __shared__ union {
    Statistics statistics[kThreads];
    Later later[kThreads];
    Sums sums[kThreads];
  } shared;
  const NormaliseBwdParams& params = backward.params;
  const NormaliseParams& p = params.fwd;
  const int c = blockIdx.x, lane = blockIdx.y, head = lane % p.num_kv_heads, first = c * kChunk + threadIdx.x * kEach;
  const int64_t at_chunk = static_cast<int64_t>(lane) * backward.forward.num_chunks + c;
  const double gamma = static_cast<const float*>(p.gamma)[head], shift = raw_score(p, lane, 0);
  float raw[kEach];
  int begins[kEach];
  inclusive<kThreads>(read_positions(p, lane, first, raw, begins), shared.statistics);
  Statistics running = backward.forward.chunks[at_chunk];
  if (threadIdx.x > 0) running = merged(running, shared.statistics[threadIdx.x - 1]);
  __syncthreads();

  Later terms[kEach];
  double own[kEach];  // d_j i_j
  Sums sums{0, 0, 0};
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int i = first + n;
    terms[n] = {0, 0, 0, 0}, own[n] = 0;
    if (i >= p.seqlen) continue;
    running = merged(running, Statistics::of(raw[n], begins[n]));
    const double du = score_gradient(params, lane, i);
    double inverse_std = 1, centred = raw[n];
    if (p.timestep_norm) inverse_std = 1 / sqrt(running.m2 / running.count + kEpsilon), centred = raw[n] - running.mean;
    own[n] = du * gamma * inverse_std;
    sums = merged(sums, {du, du * centred * inverse_std, du * (running.count - 1) / kSlopePositions});
    if (!p.timestep_norm) continue;
    double a = -own[n] / running.count, b = -0.5 * own[n] * centred * inverse_std * inverse_std / running.count;
    if (i == p.seqlen - 1 && params.dstats != nullptr) {
      const bool last_is_empty = p.cu_seqlens != nullptr && p.cu_seqlens[p.num_documents - 1] >= p.seqlen;
      if (!last_is_empty) a += params.dstats[3 * lane + 1] / running.count, b += params.dstats[3 * lane + 2];
    }
    const bool ends = i + 1 < p.seqlen && (n + 1 < kEach ? begins[n + 1] != 0 : begins_document(p, i + 1));
    terms[n] = {a, b, b * (running.mean - shift), ends};
  }

  Later upto = terms[kEach - 1];
#pragma unroll
  for (int n = kEach - 2; n >= 0; --n) upto = merged(terms[n], upto);
  upto = inclusive_from_end<kThreads>(upto, shared.later);
  if constexpr (kPass == 0) {
    if (threadIdx.x == 0) backward.chunks[at_chunk] = upto;
    __syncthreads();
    sums = inclusive_from_end<kThreads>(sums, shared.sums);
    if (threadIdx.x == 0) backward.chunk_sums[at_chunk] = sums;
  } else {
    Later behind = backward.chunks[at_chunk];
    if (threadIdx.x + 1 < kThreads) behind = merged(shared.later[threadIdx.x + 1], behind);
#pragma unroll
    for (int n = kEach - 1; n >= 0; --n) {
      const int i = first + n;
      behind = merged(terms[n], behind);
      if (i >= p.seqlen) continue;
      const double draw = own[n] + behind.a + 2 * (behind.b * (raw[n] - shift) - behind.b_mean);
      static_cast<float*>(params.draw)[(lane / p.num_kv_heads * static_cast<int64_t>(p.seqlen) + i) * p.num_kv_heads +
                                       head] = static_cast<float>(draw);
    }
  }
}

// The sums behind every chunk, the gradients of the statistics before the first position, a lane's parameter sums. One
// CTA per lane.
__global__ void __launch_bounds__(kScanThreads) later_kernel(const __grid_constant__ Backward backward) {
  __shared__ union {
    Later later[kScanThreads];
    Sums sums[kScanThreads];
  } shared;
  const NormaliseParams& p = backward.params.fwd;
  const int lane = blockIdx.x, num_chunks = backward.forward.num_chunks;
  Later* const chunks = backward.chunks + static_cast<int64_t>(lane) * num_chunks;
  const Sums* const chunk_sums = backward.chunk_sums + static_cast<int64_t>(lane) * num_chunks;
  Later behind{0, 0, 0, 0};
  Sums sums{0, 0, 0};
  for (int base = (num_chunks - 1) / kScanThreads * kScanThreads; base >= 0; base -= kScanThreads) {
    const int c = base + threadIdx.x;
    inclusive_from_end<kScanThreads>(c < num_chunks ? chunks[c] : Later{0, 0, 0, 0}, shared.later);
    if (c < num_chunks) {
      chunks[c] = threadIdx.x + 1 < kScanThreads ? merged(shared.later[threadIdx.x + 1], behind) : behind;
      sums = merged(sums, chunk_sums[c]);
    }
    behind = merged(shared.later[0], behind);
    __syncthreads();
  }
  sums = inclusive_from_end<kScanThreads>(sums, shared.sums);
  if (threadIdx.x != 0) return;
  backward.lane_sums[lane] = sums;
  double* const out = backward.params.dstats_in == nullptr ? nullptr : backward.params.dstats_in + 3 * lane;
  if (out == nullptr) return;
  out[0] = out[1] = out[2] = 0;
  if (p.cu_seqlens != nullptr) return;  // packed documents take none in
  if (!p.timestep_norm) {
    if (backward.params.dstats == nullptr) return;
    out[1] = backward.params.dstats[3 * lane + 1], out[2] = backward.params.dstats[3 * lane + 2];
    return;
  }
  // The statistics before count as count[0] raw scores at their mean, and M2 beside.
  const double count = p.stats_in == nullptr ? 0 : p.stats_in[3 * lane];
  const double mean = p.stats_in == nullptr ? 0 : p.stats_in[3 * lane + 1];
  const double shift = raw_score(p, lane, 0);
  out[1] = count * (behind.a + 2 * (behind.b * (mean - shift) - behind.b_mean));
  out[2] = behind.b;
}

// A head's sums over the batch, in order.
__global__ void parameters_kernel(const __grid_constant__ Backward backward) {
  const NormaliseParams& p = backward.params.fwd;
  const int head = blockIdx.x * blockDim.x + threadIdx.x;
  if (head >= p.num_kv_heads) return;
  Sums sums{0, 0, 0};
  for (int b = 0; b < p.batch; ++b) sums = merged(sums, backward.lane_sums[b * p.num_kv_heads + head]);
  static_cast<float*>(backward.params.dbeta)[head] = static_cast<float>(sums.beta);
  static_cast<float*>(backward.params.dgamma)[head] = static_cast<float>(sums.gamma);
  static_cast<float*>(backward.params.dslope)[head] = static_cast<float>(sums.slope);
}

int64_t carve(Backward& backward, void* workspace) {
  const NormaliseParams& p = backward.params.fwd;
  const int64_t lanes = int64_t{p.batch} * p.num_kv_heads;
  backward.forward.params = p;
  backward.forward.params.stats = nullptr;
  const int num_chunks = backward.forward.num_chunks = (p.seqlen + kChunk - 1) / kChunk;
  Carver carver(workspace);
  carver.take(backward.forward.chunks, lanes * num_chunks);
  carver.take(backward.chunks, lanes * num_chunks);
  carver.take(backward.chunk_sums, lanes * num_chunks);
  carver.take(backward.lane_sums, lanes);
  return carver.used_bytes();
}

}  // namespace

int64_t normalise_scores_backward_workspace_bytes(const NormaliseBwdParams& params) {
  Backward backward{params, {}, nullptr, nullptr, nullptr};
  return carve(backward, nullptr);
}

void normalise_scores_backward(const NormaliseBwdParams& params, void* workspace, cudaStream_t stream) {
  const NormaliseParams& p = params.fwd;
  assert(p.dtype == DType::kF32 && (p.cu_seqlens == nullptr || p.batch == 1));
  Backward backward{params, {}, nullptr, nullptr, nullptr};
  carve(backward, workspace);
  const unsigned lanes = p.batch * p.num_kv_heads;
  const dim3 grid(backward.forward.num_chunks, lanes);
  chunk_statistics_kernel<<<grid, kThreads, 0, stream>>>(backward.forward);
  chunks_kernel<<<lanes, kScanThreads, 0, stream>>>(backward.forward);
  terms_kernel<0><<<grid, kThreads, 0, stream>>>(backward);
  later_kernel<<<lanes, kScanThreads, 0, stream>>>(backward);
  terms_kernel<1><<<grid, kThreads, 0, stream>>>(backward);
  parameters_kernel<<<(p.num_kv_heads + 31) / 32, 32, 0, stream>>>(backward);
  check_cuda(cudaGetLastError(), "normalise_scores_backward");
}

}  // namespace sparsek::cuda
