// What runs before the gradients: per query row the log-sum-exp in powers of two and delta = <do, out> - dlse; zeros in
// the sums of the rows that are ever far; how many blocks of far rows the lists before each chunk's have.
#include "kernels/cuda/portable/attention_bwd/around.h"
#include "kernels/cuda/portable/launch.cuh"
#include "kernels/cuda/portable/matrix.cuh"

namespace sparsek::cuda::portable {
namespace {

constexpr int kRowThreads = 256;

// head_dim / 8 lanes a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(const __grid_constant__ BwdProblem p, const float* dlse) {
  const AttentionFwdParams& f = p.fwd;
  const int lanes = f.head_dim / 8, lane = threadIdx.x % lanes;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRowThreads / lanes) + threadIdx.x / lanes,
                rows = int64_t{f.batch} * f.seqlen_q * f.num_heads;
  const int h = static_cast<int>(row % f.num_heads), i = static_cast<int>(row / f.num_heads % f.seqlen_q);
  const int64_t b = row / f.num_heads / f.seqlen_q;
  float sum = 0;
  if (row < rows) {
    const auto at = [&](const void* tensor, const Strides& strides) {
      return *reinterpret_cast<const uint4*>(static_cast<const T*>(tensor) + b * strides.batch + i * strides.seq +
                                             h * strides.head + lane * 8);
    };
    const uint4 x = at(f.out, f.out_strides), y = at(p.dout, p.dout_strides);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 u = ptx::unpack<T>(xs[n]), v = ptx::unpack<T>(ys[n]);
      sum += u.x * v.x + u.y * v.y;
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (row < rows && lane == 0) {
    const int64_t to = (b * f.num_heads + h) * f.seqlen_q + i;
    // A NaN in tau makes its row's gradients NaN.
    const float tau = static_cast<const float*>(f.tau)[(b * f.num_kv_heads + h / p.group) * f.seqlen_q + i],
                poison = tau != tau ? tau : 0.0f;
    p.lse2[to] = static_cast<const float*>(f.softmax_lse)[to] * 1.44269504088896341f + poison;
    p.delta[to] = sum - (dlse == nullptr ? 0.0f : dlse[to]);
  }
}

// A warp per 32 rows.
__global__ void __launch_bounds__(kRowThreads) zero_kernel(const __grid_constant__ BwdProblem p) {
  const AttentionFwdParams& f = p.fwd;
  const int64_t rows = int64_t{f.batch} * f.num_kv_heads * f.seqlen_k,
                first = (blockIdx.x * static_cast<int64_t>(kRowThreads) + threadIdx.x) / 32 * 32;
  const int lane = threadIdx.x % 32;
  const bool is_far = first + lane < rows && f.far_end[first + lane] > f.far_begin[first + lane];
  uint32_t votes = __ballot_sync(kAllLanes, is_far);
  while (votes != 0) {
    const int64_t row = first + __ffs(votes) - 1;
    votes &= votes - 1;
    for (int c = lane * 4; c < f.head_dim; c += 128) {
      *reinterpret_cast<float4*>(p.dk_sum + row * f.head_dim + c) = float4{0, 0, 0, 0};
      *reinterpret_cast<float4*>(p.dv_sum + row * f.head_dim + c) = float4{0, 0, 0, 0};
    }
  }
}

// A warp per KV head.
__global__ void __launch_bounds__(32) blocks_kernel(const int32_t* counts, int num_chunks, int32_t* blocks_before) {
  const int lane = threadIdx.x;
  counts += static_cast<int64_t>(blockIdx.x) * num_chunks,
      blocks_before += static_cast<int64_t>(blockIdx.x) * (num_chunks + 1);
  int start = 0;
  for (int base = 0; base < num_chunks; base += 32) {
    const int blocks = base + lane < num_chunks ? (counts[base + lane] + kKeys - 1) / kKeys : 0;
    int sum = blocks;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (base + lane < num_chunks) blocks_before[base + lane] = start + sum - blocks;
    start += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) blocks_before[num_chunks] = start;
}

}  // namespace

void launch_around(const BwdProblem& problem, const float* dlse, int32_t* blocks_before, cudaStream_t stream) {
  const AttentionFwdParams& f = problem.fwd;
  const auto ctas = [](int64_t rows, int each) { return static_cast<unsigned>((rows + each - 1) / each); };
  const int64_t rows = int64_t{f.batch} * f.seqlen_q * f.num_heads, lanes = int64_t{f.batch} * f.num_kv_heads;
  const unsigned row_ctas = ctas(rows, kRowThreads / (f.head_dim / 8));
  if (f.dtype == DType::kBF16)
    rows_kernel<__nv_bfloat16><<<row_ctas, kRowThreads, 0, stream>>>(problem, dlse);
  else
    rows_kernel<__half><<<row_ctas, kRowThreads, 0, stream>>>(problem, dlse);
  zero_kernel<<<ctas(lanes * f.seqlen_k, kRowThreads), kRowThreads, 0, stream>>>(problem);
  blocks_kernel<<<static_cast<unsigned>(lanes), 32, 0, stream>>>(problem.live.count, problem.num_chunks, blocks_before);
}

}  // namespace sparsek::cuda::portable
