// Attention backward, the gradient of the queries by mma.sync: dq, dq_far, and per query the sum of h over its
// fractional keys (eq. 10). One CTA = 64 rows (positions x the group's heads) of one KV head, 16 a warp, Q and dO in
// registers. It walks the same blocks of keys as the forward: S = Q K^T, dP = dO V^T, dQ += dS K.
#pragma once
#include "kernels/cuda/portable/launch.cuh"
#include "kernels/cuda/portable/tile.cuh"

namespace sparsek::cuda::portable {

constexpr int kQueryRows = tile_shape(Kernel::kQueryGradient).rows;

template <int kHeadDim>
struct QueryShared {
  uint8_t k[2][kKeys * kHeadDim * 2], v[2][kKeys * kHeadDim * 2];
  TileShared<kQueryRows> tile;
  float u[2][kKeys];
  float h[kQueryRows];
};
static_assert(2 * (sizeof(QueryShared<128>) + 1024) <= 164 * 1024);  // two CTAs on an SM of compute capability 8.0

// A warp's 16 rows of a tensor as A operands.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_row_fragments(uint32_t (&to)[kHeadDim / 16][4], const void* tensor,
                                                   const Strides& strides, const Problem& p, uint32_t zero) {
  const Tile<kQueryRows> tile(p, zero);
  const int thread = static_cast<int>(threadIdx.x ^ zero);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    const bool valid = row < tile.num_rows;
    const T* const from = static_cast<const T*>(tensor) + tile.row_offset(strides, valid ? row : 0, p) + thread % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const uint32_t x = __ldg(reinterpret_cast<const uint32_t*>(from + 8 * n));
      to[n / 2][n % 2 * 2 + r] = valid ? x : 0;
    }
  }
}

template <class T, int kHeadDim>
struct QueryGradient {
  QueryShared<kHeadDim>& s;
  const BwdProblem& p;
  uint32_t q[kHeadDim / 16][4], dout[kHeadDim / 16][4];
  float dq[1][kHeadDim / 8][4];
  float lse2[2], delta[2], h[2];  // of rows lane / 4 and 8 more

  __device__ __forceinline__ void begin() {
    const Tile<kQueryRows> tile(p, 0);
    load_row_fragments<T, kHeadDim>(q, p.fwd.q, p.fwd.q_strides, p, 0);
    load_row_fragments<T, kHeadDim>(dout, p.dout, p.dout_strides, p, 0);
    clear(dq);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
      lse2[r] = INFINITY, delta[r] = 0, h[r] = 0;
      if (row < tile.num_rows) {
        const int position = divide_row(row, p.group_inverse);
        const int64_t head =
                          static_cast<int64_t>(tile.b) * p.fwd.num_heads + tile.kv * p.group + row - position * p.group,
                      at = head * p.fwd.seqlen_q + tile.first + position;
        lse2[r] = p.lse2[at], delta[r] = p.delta[at];
      }
    }
  }
  __device__ __forceinline__ void block(int n, int stage, bool is_gated) {
    const auto& t = s.tile;
    const uint32_t thread = hidden(threadIdx.x, t.zero), lane = thread % 32, warp = thread / 32;
    const int first_key = t.first_key(n);
    if (!t.warp_sees(n, first_key, warp)) return;
    const uint32_t row0 = warp * 16 + lane / 4, column0 = lane % 4 * 2;
    float x[1][8][4], dp[1][8][4];
    clear(x);
    multiply_registers<T, kHeadDim>(x[0], q, Fragments<kHeadDim>::columns(s.k[stage], lane));
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[0][m][e] = ptx::exp2_approx(x[0][m][e] * p.scale_log2 - lse2[e / 2]);
    }
    const bool is_band = n < t.band_blocks;
    if (is_band) {
      if (t.has_window_edge(first_key, warp)) mask_window(x[0], first_key + static_cast<int>(column0), row0);
    } else if (first_key + kKeys > t.far_counts.full) {
      mask_far(x[0], t.far.interval + first_key + column0, row0);
    }
    clear(dp);
    multiply_registers<T, kHeadDim>(dp[0], dout, Fragments<kHeadDim>::columns(s.v[stage], lane));
    if (is_gated && !is_band && first_key + kKeys > t.far_counts.plain) gate(x[0], dp[0], s.u[stage] + column0, row0);
    uint32_t ds[1][4][4];
#pragma unroll
    for (int m = 0; m < 8; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ds[0][m / 2][m % 2 * 2 + r] = ptx::pack<T>(x[0][m][2 * r] * (dp[0][m][2 * r] - delta[r]),
                                              x[0][m][2 * r + 1] * (dp[0][m][2 * r + 1] - delta[r]));
      }
    }
    multiply_onto<T, kHeadDim, 1>(dq, ds, Fragments<kHeadDim>::rows(s.k[stage], lane));
  }
  __device__ __forceinline__ void mask_window(float (&x)[8][4], int first_key, uint32_t row0) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int low = s.tile.window_low[row0 + 8 * r] - first_key, high = s.tile.window_high[row0 + 8 * r] - first_key;
#pragma unroll
      for (int m = 0; m < 8; ++m) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * m + c < low || 8 * m + c > high) x[m][2 * r + c] = 0;
        }
      }
    }
  }
  __device__ __forceinline__ void mask_far(float (&x)[8][4], const uint16_t* intervals, uint32_t row0) const {
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(intervals + 8 * m);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int begin = pair >> (16 * c) & 0xff, end = pair >> (16 * c + 8) & 0xff;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int position = s.tile.position[row0 + 8 * r];
          if (position < begin || position >= end) x[m][2 * r + c] = 0;
        }
      }
    }
  }
  // h, and dP times the gate.
  __device__ __forceinline__ void gate(const float (&x)[8][4], float (&dp)[8][4], const float* u, uint32_t row0) {
    const bool is_soft = p.fwd.gate == Gate::kSoft;
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const float2 pair = *reinterpret_cast<const float2*>(u + 8 * m);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float tau = s.tile.tau[row0 + 8 * r];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float weight = (c == 0 ? pair.x : pair.y) - tau;
          float& y = dp[m][2 * r + c];
          if (weight > 0 && weight < 1) h[r] += x[m][2 * r + c] * y;
          if (is_soft) y *= __saturatef(weight);
        }
      }
    }
  }
  // After a barrier.
  __device__ __forceinline__ void store(void* tensor) {
    const uint32_t zero = hidden(0, s.tile.zero);
    const Tile<kQueryRows> tile(p, zero);
    const int thread = static_cast<int>(threadIdx.x ^ zero), warp_row = thread / 32 * 16;
    const int64_t stride = int64_t{p.fwd.num_heads} * kHeadDim;
    const Strides strides{p.fwd.seqlen_q * stride, stride, kHeadDim};
    store_rows<T, kHeadDim>(dq[0], p.scale, p.scale, s.k[0], warp_row, thread % 32, [&](int r) -> T* {
      const int row = warp_row + r;
      return row < tile.num_rows ? static_cast<T*>(tensor) + tile.row_offset(strides, row, p) : nullptr;
    });
  }
  __device__ __forceinline__ void store_h() {
    const uint32_t zero = hidden(0, s.tile.zero);
    const Tile<kQueryRows> tile(p, zero);
    const int thread = static_cast<int>(threadIdx.x ^ zero);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = h[r];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (thread % 4 == 0) s.h[thread / 32 * 16 + thread % 32 / 4 + 8 * r] = sum;
    }
    __syncthreads();
    if (thread > tile.last - tile.first) return;
    const float tau = s.tile.tau[thread * p.group];
    float sum = tau != tau ? tau : 0.0f;  // a NaN in tau makes its row's gradients NaN
    for (int g = 0; g < p.group; ++g) sum += s.h[thread * p.group + g];
    p.h_query[static_cast<int64_t>(tile.head) * p.fwd.seqlen_q + tile.first + thread] = sum;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ctas_per_multiprocessor(kHeadDim))
    attention_dq_kernel(const __grid_constant__ BwdProblem p) {
  extern __shared__ __align__(256) uint8_t memory[];
  auto& s = *reinterpret_cast<QueryShared<kHeadDim>*>(memory);
  auto& t = s.tile;
  const bool is_gated = p.fwd.gate == Gate::kSoft || p.h_query != nullptr;
  describe_tile<T>(t, p);
  begin_runs(t, p, is_gated);
  const auto load = [&](int n, int stage) {
    load_keys<kHeadDim>(s.k[stage], t, p, n, true);
    load_keys<kHeadDim>(s.v[stage], t, p, n, false);
    load_scores(s.u[stage], t, n);
    ptx::copy_async_commit();
  };
  QueryGradient<T, kHeadDim> rows{s, p};
  rows.begin();
  int n = 0, stage = 0;
#pragma unroll 1
  do {
    if (n < t.end) load(n, stage);
#pragma unroll 1
    for (; n < t.end; ++n, stage ^= 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // block n is there, the other buffers read
      if (n + 1 < t.end) load(n + 1, stage ^ 1);
      rows.block(n, stage, is_gated);
    }
  } while (next_run(t, p, is_gated, n, [&] {
    rows.store(p.dq);
    clear(rows.dq);
    load_row_fragments<T, kHeadDim>(rows.q, p.fwd.q_far, p.fwd.q_far_strides, p, hidden(0, t.zero));
  }));
  __syncthreads();
  rows.store(p.fwd.q_far != nullptr ? p.dq_far : p.dq);
  if (p.h_query != nullptr) rows.store_h();
}

template <class T>
void launch_query_gradient(const BwdProblem& problem, cudaStream_t stream) {
  const AttentionFwdParams& fwd = problem.fwd;
  const int positions = problem.positions_per_step;
  const int64_t tiles = (int64_t{fwd.seqlen_q} + positions - 1) / positions * fwd.batch * fwd.num_kv_heads;
  if (fwd.head_dim == 128)
    launch<QueryShared<128>>(attention_dq_kernel<T, 128>, tiles, problem, stream);
  else
    launch<QueryShared<64>>(attention_dq_kernel<T, 64>, tiles, problem, stream);
}

}  // namespace sparsek::cuda::portable
