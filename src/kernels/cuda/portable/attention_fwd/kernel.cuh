// Attention forward by mma.sync: eq. 7-9. One CTA = 128 rows (positions x the group's heads) of one KV head, 32 a warp.
// It walks blocks of 64 keys, the window band first, then the union of far rows visible to any of its queries: S = Q
// K^T, softmax with a running maximum, O += (P gate) V. V of a block is on its way while S is computed, K of the next
// one during the rest.
#pragma once
#include "kernels/cuda/portable/launch.cuh"
#include "kernels/cuda/portable/tile.cuh"

namespace sparsek::cuda::portable {

constexpr int kFwdRows = tile_shape(Kernel::kForward).rows;
constexpr float kMaxGrowth = 8.0f;  // a row's maximum may lag by this many powers of two; O is rescaled beyond that

template <int kHeadDim>
struct FwdShared {
  uint8_t q[kFwdRows * kHeadDim * 2], k[kKeys * kHeadDim * 2], v[kKeys * kHeadDim * 2];
  TileShared<kFwdRows> tile;
  float u[kKeys];
  alignas(16) float sums[kThreads][2][2];  // FwdRows::softmax
};
static_assert(2 * (sizeof(FwdShared<128>) + 1024) <= 164 * 1024);  // two CTAs on an SM of compute capability 8.0

// The 32 rows of a warp.
template <class T, int kHeadDim>
struct FwdRows {
  float acc[2][kHeadDim / 8][4];
  float reference[2][2];  // of row m * 16 + r * 8 + lane / 4, in powers of two; the sums of exponentials are in s.sums
  float scores[2][8][4];
  FwdShared<kHeadDim>& s;
  const uint32_t thread;

  __device__ explicit FwdRows(FwdShared<kHeadDim>& shared, uint32_t thread) : s(shared), thread(thread) {
    clear(acc);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) reference[m][r] = -1e30f, s.sums[thread][m][r] = 0;
    }
  }

  // Of the lane's first element: the tile's row, the block's key.
  static __device__ __forceinline__ uint32_t row_of(uint32_t thread) { return thread / 32 * 32 + thread % 32 / 4; }
  static __device__ __forceinline__ uint32_t column_of(uint32_t thread) { return thread % 4 * 2; }

  __device__ __forceinline__ void multiply_keys() {
    const uint32_t t = hidden(thread, s.tile.zero);
    multiply_rows<T, kHeadDim, 2>(scores, Fragments<kHeadDim>::rows(s.q, t % 32), t / 32 * 2,
                                  Fragments<kHeadDim>::columns(s.k, t % 32));
  }
  __device__ __forceinline__ void mask_window(int first_key) {
    const uint32_t t = hidden(thread, s.tile.zero), row0 = row_of(t), column0 = column_of(t);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key0 = first_key + static_cast<int>(column0), low = s.tile.window_low[row0 + 16 * m + 8 * r] - key0,
                  high = s.tile.window_high[row0 + 16 * m + 8 * r] - key0;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (8 * n + c < low || 8 * n + c > high) scores[m][n][2 * r + c] = -INFINITY;
          }
        }
      }
    }
  }
  __device__ __forceinline__ void mask_far(const uint16_t* intervals) {
    const uint32_t t = hidden(thread, s.tile.zero), row0 = row_of(t), column0 = column_of(t);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(intervals + 8 * n + column0);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int begin = pair >> (16 * c) & 0xff, end = pair >> (16 * c + 8) & 0xff;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int position = s.tile.position[row0 + 16 * m + 8 * r];
            if (position < begin || position >= end) scores[m][n][2 * r + c] = -INFINITY;
          }
        }
      }
    }
  }
  // From logits to exponentials, and the sums of them.
  __device__ __forceinline__ void softmax(float scale_log2) {
    float most[2][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(scores[m][0][2 * r], scores[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < 8; ++n) x = fmaxf(x, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2)) * scale_log2;
        most[m][r] = x;
        grew |= x > reference[m][r] + kMaxGrowth;
      }
    }
    float(&sum)[2][2] = s.sums[hidden(thread, s.tile.zero)];
    if (__any_sync(kAllLanes, grew)) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float now = fmaxf(reference[m][r], most[m][r]), factor = ptx::exp2_approx(reference[m][r] - now);
          reference[m][r] = now;
          sum[m][r] *= factor;
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) acc[m][n][2 * r] *= factor, acc[m][n][2 * r + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float part[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = scores[m][n][2 * r + c];
            x = ptx::exp2_approx(x * scale_log2 - reference[m][r]);
            part[c] += x;
          }
        }
        sum[m][r] += part[0] + part[1];
      }
    }
  }
  // The weights of V: exponentials, times their gates.
  __device__ __forceinline__ void weigh(uint32_t (&weights)[2][4][4], bool is_gated) {
    const uint32_t t = hidden(thread, s.tile.zero), row0 = row_of(t), column0 = column_of(t);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (is_gated) {
        const float2 u = *reinterpret_cast<const float2*>(&s.u[8 * n + column0]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float tau = s.tile.tau[row0 + 16 * m + 8 * r];
            scores[m][n][2 * r] *= __saturatef(u.x - tau);
            scores[m][n][2 * r + 1] *= __saturatef(u.y - tau);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
          weights[m][n / 2][n % 2 * 2 + r] = ptx::pack<T>(scores[m][n][2 * r], scores[m][n][2 * r + 1]);
      }
    }
  }
};

template <int kHeadDim>
__device__ __forceinline__ void load_queries(FwdShared<kHeadDim>& s, const Problem& p, const void* q,
                                             const Strides& strides, uint32_t zero) {
  const Tile<kFwdRows> tile(p, zero);
  const RowCopy<kHeadDim> copy(threadIdx.x ^ zero);
  const auto is_there = [&](uint32_t row) { return static_cast<int>(row) < tile.num_rows; };
  copy.template copy<kFwdRows>(
      s.q,
      [&](uint32_t row, uint32_t, uint32_t) {
        return static_cast<const uint8_t*>(q) +
               2 * tile.row_offset(strides, is_there(row) ? static_cast<int>(row) : 0, p);
      },
      [&](uint32_t row) { return is_there(row) ? 16u : 0u; });
  ptx::copy_async_commit();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ctas_per_multiprocessor(kHeadDim))
    attention_fwd_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(256) uint8_t memory[];
  auto& s = *reinterpret_cast<FwdShared<kHeadDim>*>(memory);
  auto& t = s.tile;
  const AttentionFwdParams& f = p.fwd;
  const uint32_t thread = threadIdx.x;
  const bool is_soft = f.gate == Gate::kSoft;
  load_queries<kHeadDim>(s, p, f.q, f.q_strides, 0);
  describe_tile<T>(t, p);
  begin_runs(t, p, is_soft);
  const auto load_k = [&](int n) {
    load_keys<kHeadDim>(s.k, t, p, n, true);
    ptx::copy_async_commit();
  };
  FwdRows<T, kHeadDim> rows(s, thread);
  int n = 0;
#pragma unroll 1
  do {
    if (n < t.end) load_k(n);
#pragma unroll 1
    for (; n < t.end; ++n) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // K of block n is there, V of block n - 1 read
      load_keys<kHeadDim>(s.v, t, p, n, false);
      load_scores(s.u, t, n);
      ptx::copy_async_commit();
      const int first_key = t.first_key(n);
      const bool sees = t.warp_sees(n, first_key, hidden(thread, t.zero) / 32);
      clear(rows.scores);  // also where nothing is seen: or they live in registers from one block to the next
      if (sees) rows.multiply_keys();
      ptx::copy_async_wait<0>();
      __syncthreads();  // V of block n is there, K read
      if (n + 1 < t.end) load_k(n + 1);
      if (!sees) continue;
      const bool is_band = n < t.band_blocks;
      if (is_band) {
        if (t.has_window_edge(first_key, hidden(thread, t.zero) / 32)) rows.mask_window(first_key);
      } else if (first_key + kKeys > t.far_counts.full) {
        rows.mask_far(t.far.interval + first_key);
      }
      rows.softmax(p.scale_log2);
      uint32_t weights[2][4][4];
      rows.weigh(weights, is_soft && !is_band && first_key + kKeys > t.far_counts.plain);
      multiply_onto<T, kHeadDim, 2>(rows.acc, weights, Fragments<kHeadDim>::rows(s.v, hidden(thread, t.zero) % 32));
    }
  } while (
      next_run(t, p, is_soft, n, [&] { load_queries<kHeadDim>(s, p, f.q_far, f.q_far_strides, hidden(0, t.zero)); }));
  ptx::copy_async_wait<0>();
  __syncthreads();

  const uint32_t zero = hidden(0, t.zero);
  const Tile<kFwdRows> tile(p, zero);
  const int warp_row = static_cast<int>((thread ^ zero) / 32 * 32), lane = static_cast<int>((thread ^ zero) % 32);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = s.sums[warp_row + lane][m][r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      // A score that is not finite makes tau NaN: so is the row.
      const int row = warp_row + 16 * m + 8 * r + lane / 4;
      const float row_tau = t.tau[row], poison = row_tau != row_tau ? row_tau : 0.0f;
      scale[r] = (total > 0 ? 1.0f / total : 0.0f) + poison;
      if (lane % 4 == 0 && row < tile.num_rows) {
        const int position = divide_row(row, p.group_inverse);
        const int64_t head = static_cast<int64_t>(tile.b) * f.num_heads + tile.kv * p.group + row - position * p.group;
        static_cast<float*>(f.softmax_lse)[head * f.seqlen_q + tile.first + position] =
            (total > 0 ? (rows.reference[m][r] + log2f(total)) * 0.69314718055994531f : -INFINITY) + poison;
      }
    }
    store_rows<T, kHeadDim>(rows.acc[m], scale[0], scale[1], s.q, warp_row + 16 * m, lane, [&](int r) -> T* {
      const int row = warp_row + 16 * m + r;
      return row < tile.num_rows ? static_cast<T*>(f.out) + tile.row_offset(f.out_strides, row, p) : nullptr;
    });
  }
}

template <class T>
void launch_forward(const Problem& problem, cudaStream_t stream) {
  const AttentionFwdParams& fwd = problem.fwd;
  const int positions = 2 * problem.positions_per_step;
  const int64_t tiles = (int64_t{fwd.seqlen_q} + positions - 1) / positions * fwd.batch * fwd.num_kv_heads;
  if (fwd.head_dim == 128)
    launch<FwdShared<128>>(attention_fwd_kernel<T, 128>, tiles, problem, stream);
  else
    launch<FwdShared<64>>(attention_fwd_kernel<T, 64>, tiles, problem, stream);
}

}  // namespace sparsek::cuda::portable
