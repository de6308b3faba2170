// eq. 1b: the list of sinks, then the two passes.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/shared_memory.h"
#include "kernels/cuda/sm90/window_mass/launch.h"
#include "kernels/cuda/window_mass/lse_kernel.cuh"
#include "kernels/cuda/window_mass/mass_kernel.cuh"
#include "kernels/cuda/window_mass/window_mass.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

using mass::Problem;

constexpr int kListThreads = 1024, kListEach = 8;

// One CTA per batch row: the rows that some query sees as far, ascending. There are few, so most of the work is to see
// that there are none.
__global__ void __launch_bounds__(kListThreads) far_rows_kernel(const __grid_constant__ Problem p) {
  __shared__ int counts[kListThreads / 32];
  const int64_t b = blockIdx.x;
  const int32_t *begin = p.far_begin + b * p.seqlen_k, *end = p.far_end + b * p.seqlen_k;
  const int warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32;
  int total = 0;
#pragma unroll 1
  for (int base = 0; base < p.seqlen_k; base += kListThreads * kListEach) {
    uint32_t is_far = 0;
#pragma unroll
    for (int n = 0; n < kListEach; ++n) {
      const int row = base + n * kListThreads + threadIdx.x;
      if (row < p.seqlen_k && max(begin[row], 0) < min(end[row], p.seqlen_q)) is_far |= 1u << n;
    }
    if (!__syncthreads_or(static_cast<int>(is_far))) continue;
#pragma unroll 1
    for (int n = 0; n < kListEach; ++n) {
      const uint32_t votes = __ballot_sync(0xffffffffu, is_far >> n & 1);
      if (warp_lane == 0) counts[warp] = __popc(votes);
      __syncthreads();
      int at = total + __popc(votes & ((1u << warp_lane) - 1));
      for (int w = 0; w < kListThreads / 32; ++w) {
        if (w < warp) at += counts[w];
        total += counts[w];
      }
      if (is_far >> n & 1) p.far_rows[b * p.seqlen_k + at] = base + n * kListThreads + threadIdx.x;
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) p.num_far[b] = total;
}

int64_t carve(const WindowMassParams& params, void* workspace, Problem& p) {
  Carver carver(workspace);
  carver.take(p.lse2, int64_t{params.batch} * params.num_heads * params.seqlen_q);
  carver.take(p.far_rows, int64_t{params.batch} * params.seqlen_k);
  carver.take(p.num_far, params.batch);
  return carver.used_bytes();
}

Problem describe(const WindowMassParams& params, void* workspace) {
  Problem p{};
  carve(params, workspace, p);
  p.q = params.q, p.k = params.k, p.q_strides = params.q_strides, p.k_strides = params.k_strides;
  p.has_far_rotary = params.q_far != nullptr;
  p.q_far = p.has_far_rotary ? params.q_far : params.q, p.k_far = p.has_far_rotary ? params.k_far : params.k;
  p.q_far_strides = p.has_far_rotary ? params.q_far_strides : params.q_strides;
  p.k_far_strides = p.has_far_rotary ? params.k_far_strides : params.k_strides;
  p.window_begin = params.window_begin, p.far_begin = params.far_begin, p.far_end = params.far_end;
  p.mass_in = static_cast<const float*>(params.mass_in), p.mass = static_cast<float*>(params.mass);
  p.batch = params.batch, p.seqlen_q = params.seqlen_q, p.seqlen_k = params.seqlen_k;
  p.num_carried = params.num_carried, p.num_heads = params.num_heads, p.num_kv_heads = params.num_kv_heads;
  p.window_size = std::min(params.window_size, 1 << 30), p.group = params.num_heads / params.num_kv_heads;
  p.has_even_groups = 8 % p.group == 0;  // Rows::kAtOnce is 8 or 16
  p.tile_positions = mass::kTileRows / p.group;
  p.num_query_tiles = static_cast<int32_t>((int64_t{p.seqlen_q} + p.tile_positions - 1) / p.tile_positions);
  p.num_key_tiles = static_cast<int32_t>((int64_t{p.seqlen_k} + mass::kTileRows - 1) / mass::kTileRows);
  p.group_inverse = p.group == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + p.group - 1) / p.group);
  p.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  if (std::abs(p.scale_log2) < 1e-35f) p.scale_log2 = 1e-35f;  // logits as good as 0
  p.nothing = p.scale_log2 > 0 ? -INFINITY : INFINITY;
  return p;
}

template <class Shared, class Kernel>
void launch(Kernel* kernel, int64_t blocks, const Problem& p, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= kPortableSharedBytes);
  if (blocks == 0) return;
  allow_shared_bytes(kernel, sizeof(Shared));
  kernel<<<static_cast<unsigned>(blocks), mass::kThreads, sizeof(Shared), stream>>>(p);
  check_cuda(cudaGetLastError(), "window_mass");
}

template <class T, int kHeadDim>
void run(const Problem& p, cudaStream_t stream) {
  const int64_t lanes = int64_t{p.batch} * p.num_kv_heads;
  launch<typename mass::LseTile<T, kHeadDim>::Shared>(mass::lse_kernel<T, kHeadDim>, lanes * p.num_query_tiles, p,
                                                      stream);
  launch<typename mass::MassTile<T, kHeadDim>::Shared>(mass::mass_kernel<T, kHeadDim>, lanes * p.num_key_tiles, p,
                                                       stream);
}

}  // namespace

int64_t window_mass_workspace_bytes(const WindowMassParams& params) {
  Problem problem{};
  return carve(params, nullptr, problem);
}

void window_mass(const WindowMassParams& params, void* workspace, cudaStream_t stream, KernelChoice choice) {
  assert(params.dtype == DType::kBF16 || params.dtype == DType::kF16);
  assert(params.head_dim == 64 || params.head_dim == 128);
  assert(params.num_heads / params.num_kv_heads <= 64);
  if (params.batch == 0 || params.seqlen_k == 0) return;
  const Problem p = describe(params, workspace);
  far_rows_kernel<<<static_cast<unsigned>(p.batch), kListThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "window_mass");
  if (choice != KernelChoice::kPortable && compute_capability() == 90)
    mass::sm90::run(p, params.dtype, params.head_dim, stream);
  else if (params.dtype == DType::kBF16)
    params.head_dim == 64 ? run<__nv_bfloat16, 64>(p, stream) : run<__nv_bfloat16, 128>(p, stream);
  else
    params.head_dim == 64 ? run<__half, 64>(p, stream) : run<__half, 128>(p, stream);
}

}  // namespace sparsek::cuda
