// First pass of window_mass on Hopper: as ../../window_mass/lse_kernel.cuh, which see.
#pragma once
#include "kernels/cuda/sm90/window_mass/tiles.cuh"

namespace sparsek::cuda::mass::sm90 {

template <int kBlockBytes>
struct LseShared {
  uint8_t tile[kBlockBytes];
  uint8_t blocks[kStages][kBlockBytes];
  int32_t far_row[kThreads], far_begin[kThreads], far_end[kThreads];
  int32_t far_count[kWarps];
  int32_t window_begin[kTileRows], own[kTileRows];  // by stacked row; own -1 where there is none
};

// Maximum and sum of a thread's two rows: each has its columns' part of the sum, all of a quad the same maximum.
struct RowSums {
  float maximum[2], sum[2];

  __device__ __forceinline__ void add(int h, float logit, float scale) {
    sum[h] += ptx::exp2_approx(fmaf(logit, scale, -maximum[h]));
  }
  // 16 columns; is_visible(h, n): product n, of row h of the thread's.
  template <class IsVisible>
  __device__ __forceinline__ void add_masked(const float (&d)[8], float scale, IsVisible&& is_visible) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[4], largest = -INFINITY;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int n = c / 2 * 4 + h * 2 + c % 2;
        x[c] = is_visible(h, n) ? d[n] * scale : -INFINITY;
        largest = fmaxf(largest, x[c]);
      }
      largest = fmaxf(maximum[h], quad_maximum(largest));
      const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet
      sum[h] *= ptx::exp2_approx(maximum[h] - shift);
      maximum[h] = largest;
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[h] += ptx::exp2_approx(x[c] - shift);
    }
  }
};

template <class T, int kHeadDim>
struct LseTile {
  using R = Rows<T, kHeadDim>;
  using Shared = LseShared<R::kBytes>;
  const Problem& p;
  Shared& s;
  const Lane<T> lane;
  const int first, positions;  // of the tile's queries
  const int warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32;
  RowSums rows;

  __device__ LseTile(const Problem& p, Shared& s, int64_t lane, int tile)
      : p(p), s(s), lane(p, lane), first(tile * p.tile_positions), positions(min(p.tile_positions, p.seqlen_q - first)) {
    if (threadIdx.x >= kTileRows) return;
    const int position = p.by_group(threadIdx.x);
    const bool is_there = position < positions;
    s.own[threadIdx.x] = is_there ? p.num_carried + first + position : -1;
    s.window_begin[threadIdx.x] = is_there ? p.clamped_window_begin(this->lane.b, first + position) : INT32_MAX;
  }

  __device__ int row(int h) const { return warp * kWarpRows + warp_lane / 4 + 8 * h; }
  __device__ uint32_t stage(int n) const { return ptx::shared_address(s.blocks[n % kStages]); }
  __device__ uint32_t tile() const { return ptx::shared_address(s.tile); }

  __device__ void copy_queries(const void* base, const Strides& strides) {
    R::copy_queries(p, tile(), lane.queries(p, base, strides) + first * strides.seq, strides, 0, 0, positions - 1);
    ptx::copy_async_commit();
  }

  // The window rows, the newest block first.
  __device__ void band(bool running_maximum) {
    const int newest = p.num_carried + first + positions - 1, oldest = p.clamped_window_begin(lane.b, first);
    const int num_blocks = (newest - oldest) / kTileRows + 1;
    const T* const k = lane.keys(p.k, p.k_strides);
    const auto copy = [&](int n) {
      const int begin = newest + 1 - (n + 1) * kTileRows, row = R::first_row();
      R::copy_steps(stage(n), row, k + (begin + row) * p.k_strides.seq, R::kAtOnce * p.k_strides.seq, -begin,
                    kTileRows);
      ptx::copy_async_commit();
    };
    // What the rows of this warp and of its warpgroup see.
    const int warp_first = p.by_group(warp * kWarpRows),
              warp_last = min(p.by_group(warp * kWarpRows + kWarpRows - 1), positions - 1),
              group_first = p.by_group(warp / 4 * 64), group_last = min(p.by_group(warp / 4 * 64 + 63), positions - 1);
    const bool has_rows = warp_first < positions, group_has_rows = group_first < positions;
    const int first_own = p.num_carried + first + warp_first, last_own = p.num_carried + first + warp_last,
              group_own = p.num_carried + first + group_last;
    const int first_begin = has_rows ? p.clamped_window_begin(lane.b, first + warp_first) : 0,
              last_begin = has_rows ? p.clamped_window_begin(lane.b, first + warp_last) : 0,
              group_begin = group_has_rows ? p.clamped_window_begin(lane.b, first + group_first) : 0;
    copy(0);
    wait_for_copies();
#pragma unroll 1
    for (int n = 0; n < num_blocks; ++n) {
      const bool is_last = n + 1 == num_blocks;
      take_turn(n);
      if (!is_last) copy(n + 1);
      const int begin = newest + 1 - (n + 1) * kTileRows;
      if (!group_has_rows || begin + kTileRows <= group_begin || begin > group_own) {
        pass_turn(is_last);
        continue;
      }
      float d[64];
      R::multiply(d, tile(), stage(n));
      pass_turn(is_last);
      if (!has_rows) continue;
      // An own key lies in newer columns, so that the row has its maximum.
      if (begin >= last_begin && begin + kTileRows <= first_own && !running_maximum) {
#pragma unroll
        for (int e = 0; e < 64; ++e) rows.add(e / 2 % 2, d[e], p.scale_log2);
        continue;
      }
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {
        const int first_key = begin + part * kColumns;
        if (first_key + kColumns <= first_begin || first_key > last_own) continue;
        const float(&x)[8] = *reinterpret_cast<const float(*)[8]>(&d[part * 8]);
        if (first_key >= last_begin && first_key + kColumns <= first_own && !running_maximum) {
#pragma unroll
          for (int e = 0; e < 8; ++e) rows.add(e / 2 % 2, x[e], p.scale_log2);
        } else {
          forget_shared_memory();
          rows.add_masked(x, p.scale_log2, [&](int h, int e) {
            const int key = first_key + e / 4 * 8 + warp_lane % 4 * 2 + e % 2;
            return key >= s.window_begin[row(h)] && key <= s.own[row(h)];
          });
        }
      }
    }
  }

  // The sinks: those of the batch row's far rows that the tile sees, 128 at once.
  __device__ void far_rows() {
    const int num_far = p.num_far[lane.b];
    if (num_far == 0) return;
    __syncthreads();
    if (p.has_far_rotary) copy_queries(p.q_far, p.q_far_strides);
    const T* const k = lane.keys(p.k_far, p.k_far_strides);
#pragma unroll 1
    for (int base = 0; base < num_far; base += kThreads) {
      int far_row = -1, begin = 0, end = 0;
      if (base + static_cast<int>(threadIdx.x) < num_far) {
        far_row = p.far_rows[lane.b * p.seqlen_k + base + threadIdx.x];
        begin = p.far_begin[lane.b * p.seqlen_k + far_row], end = p.far_end[lane.b * p.seqlen_k + far_row];
      }
      const bool is_seen = far_row >= 0 && begin < first + positions && end > first;
      const uint32_t votes = __ballot_sync(0xffffffffu, is_seen);
      __syncthreads();
      if (warp_lane == 0) s.far_count[warp] = __popc(votes);
      __syncthreads();
      int at = __popc(votes & ((1u << warp_lane) - 1)), count = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) at += s.far_count[w];
        count += s.far_count[w];
      }
      if (is_seen) s.far_row[at] = far_row, s.far_begin[at] = begin, s.far_end[at] = end;
      __syncthreads();
#pragma unroll 1
      for (int block = 0; block < count; block += kTileRows) {
        R::copy(stage(0), [&](int row) -> const T* {
          return block + row < count ? k + s.far_row[block + row] * p.k_far_strides.seq : nullptr;
        });
        ptx::copy_async_commit();
        wait_for_copies();
#pragma unroll 1
        for (int part = 0; part < kParts && block + part * kColumns < count; ++part) {
          float d[8];
          R::multiply_part(d, tile(), stage(0), part);
          rows.add_masked(d, p.scale_log2, [&](int h, int e) {
            const int n = block + part * kColumns + e / 4 * 8 + warp_lane % 4 * 2 + e % 2,
                      query = s.own[row(h)] - p.num_carried;
            return n < count && query >= 0 && s.far_begin[n] <= query && query < s.far_end[n];
          });
        }
        __syncthreads();
      }
    }
  }

  __device__ void run() {
#pragma unroll 1
    for (int running_maximum = 0; running_maximum < 2; ++running_maximum) {
      for (int h = 0; h < 2; ++h) rows.maximum[h] = -INFINITY, rows.sum[h] = 0;
      copy_queries(p.q, p.q_strides);
      band(running_maximum != 0);
      far_rows();
      bool fits = true;
      for (int h = 0; h < 2; ++h) {
        rows.sum[h] = quad_sum(rows.sum[h]);
        fits &= s.own[row(h)] < 0 || rows.sum[h] < kLargestSum;
      }
      if (__syncthreads_and(fits)) break;
    }
    float* const lse2 = p.lse2 + (lane.lane * p.seqlen_q + first) * p.group;
    for (int h = 0; h < 2; ++h) {
      if (warp_lane % 4 == 0 && s.own[row(h)] >= 0) lse2[row(h)] = rows.maximum[h] + log2f(rows.sum[h]);
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) window_lse_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<typename LseTile<T, kHeadDim>::Shared*>(memory);
  LseTile<T, kHeadDim>(p, s, blockIdx.x / p.num_query_tiles, blockIdx.x % p.num_query_tiles).run();
}

}  // namespace sparsek::cuda::mass::sm90
