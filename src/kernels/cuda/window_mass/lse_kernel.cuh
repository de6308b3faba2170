// First pass of window_mass: lse^W_i, over the window and the sinks. A CTA has 128 stacked query rows in registers and
// passes its band of keys through shared memory, the newest first, so that a row's own key is met before the keys that
// need no mask. The maximum up to there, or of what else the masked blocks hold, is subtracted from all later logits
// without looking at them; where a sum grows beyond kLargestSum all the same, the tile is done again with a running
// maximum.
#pragma once
#include "kernels/cuda/window_mass/tiles.cuh"

namespace sparsek::cuda::mass {

constexpr int kRowsOfThread = 4;  // 16 m + lane / 4 + 8 h at [2 m + h]

template <int kBlockBytes>
struct LseShared {
  uint8_t blocks[kStages][kBlockBytes];
  int32_t window_begin[kTileRows], own[kTileRows];  // by stacked row; own -1 where there is none
  int32_t far_row[kTileRows], far_begin[kTileRows], far_end[kTileRows];
  int32_t far_count[kThreads / 32];
};

// Maximum and sum of a thread's rows: each has its columns' part of the sum, all of a quad the same maximum.
struct Softmax {
  float maximum[kRowsOfThread], sum[kRowsOfThread];

  // The n-th logit of a thread; visible, of a row that has a maximum.
  __device__ __forceinline__ void add(const Products& d, int n, float scale) {
    const int r = row_of(n);
    sum[r] += exp2_in_place(fmaf(d[n / 8][n / 4 % 2][n % 4], scale, -maximum[r]));
  }
  // is_visible(r of the thread's rows, column of the 16).
  template <class IsVisible>
  __device__ __forceinline__ void add_masked(Products& d, float scale, IsVisible&& is_visible) {
    const int first_column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = d[r / 2][n][r % 2 * 2 + e];
          x = is_visible(r, n * 8 + first_column + e) ? x * scale : -INFINITY;
          largest = fmaxf(largest, x);
        }
      }
      largest = fmaxf(maximum[r], quad_maximum(largest));
      const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet
      sum[r] *= ptx::exp2_approx(maximum[r] - shift);
      maximum[r] = largest;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[r] += ptx::exp2_approx(d[r / 2][n][r % 2 * 2 + e] - shift);
      }
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
  uint32_t a[2][R::kSteps][4];
  Softmax softmax;

  __device__ LseTile(const Problem& p, Shared& s, int64_t lane, int tile)
      : p(p), s(s), lane(p, lane), first(tile * p.tile_positions), positions(min(p.tile_positions, p.seqlen_q - first)) {}

  __device__ int row(int r) const { return warp * kWarpRows + r / 2 * 16 + warp_lane / 4 + r % 2 * 8; }
  __device__ uint32_t stage(int n) const { return ptx::shared_address(s.blocks[n % kStages]); }

  __device__ void describe_rows() {
    const int position = p.by_group(threadIdx.x);
    const bool is_there = position < positions;
    s.own[threadIdx.x] = is_there ? p.num_carried + first + position : -1;
    s.window_begin[threadIdx.x] = is_there ? p.clamped_window_begin(lane.b, first + position) : INT32_MAX;
  }

  __device__ void load_queries(const void* base, const Strides& strides) {
    __syncthreads();
    const T* const q = lane.queries(p, base, strides) + first * strides.seq;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int position = p.by_group(n * kBlockRows);
      R::copy_queries(p, stage(n), q, strides, position, n * kBlockRows - position * p.group, positions - 1);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    R::load_tile(a, stage(0));
    __syncthreads();
  }

  // The window rows, the newest block first.
  __device__ void band(bool running_maximum) {
    const int newest = p.num_carried + first + positions - 1, oldest = s.window_begin[0];
    const int num_blocks = (newest - oldest) / kBlockRows + 1;
    const T* const k = lane.keys(p.k, p.k_strides);
    const auto begin_of = [&](int n) { return newest + 1 - (n + 1) * kBlockRows; };
    const auto copy = [&](int n) {
      if (n < num_blocks) {
        const int begin = begin_of(n);
        const int row = R::first_row();
        R::copy_steps(stage(n), row, k + (begin + row) * p.k_strides.seq, R::kAtOnce * p.k_strides.seq, -begin,
                      kBlockRows);
      }
      ptx::copy_async_commit();
    };
    // What this warp's rows see.
    const int first_position = p.by_group(warp * kWarpRows),
              last_position = min(p.by_group(warp * kWarpRows + kWarpRows - 1), positions - 1);
    const bool has_rows = first_position < positions;
    const int last_row = min(warp * kWarpRows + kWarpRows, positions * p.group) - 1;
    const int first_own = p.num_carried + first + first_position, last_own = p.num_carried + first + last_position;
    const int first_begin = has_rows ? s.window_begin[warp * kWarpRows] : 0,
              last_begin = has_rows ? s.window_begin[last_row] : 0;
#pragma unroll
    for (int n = 0; n < kStages - 1; ++n) copy(n);
#pragma unroll 1
    for (int n = 0; n < num_blocks; ++n) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(n + kStages - 1);
      const int begin = begin_of(n);
      if (!has_rows || begin + kBlockRows <= first_begin || begin > last_own) continue;
      // An own key lies in a newer block, so that the row has its maximum.
      const bool is_plain = begin >= last_begin && begin + kBlockRows <= first_own && !running_maximum;
      if (is_plain) {
        Products d[2];
        R::multiply(d[0], a, stage(n), 0, [](int) {});
#pragma unroll
        for (int part = 1; part < kBlockRows / kColumns; ++part) {
          R::multiply(d[part % 2], a, stage(n), part, [&](int step) { add_share(d[(part - 1) % 2], step); });
        }
#pragma unroll
        for (int product = 0; product < kProducts; ++product) softmax.add(d[1], product, p.scale_log2);
      } else {
#pragma unroll 1
        for (int part = kBlockRows / kColumns - 1; part >= 0; --part) {  // the newest first, as above
          const int first_key = begin + part * kColumns;
          if (first_key + kColumns <= first_begin || first_key > last_own) continue;
          Products d;
          R::multiply(d, a, stage(n), part, [](int) {});
          if (first_key >= last_begin && first_key + kColumns <= first_own && !running_maximum) {
#pragma unroll
            for (int product = 0; product < kProducts; ++product) softmax.add(d, product, p.scale_log2);
          } else {
            forget_shared_memory();
            softmax.add_masked(d, p.scale_log2, [&](int r, int column) {
              return first_key + column >= s.window_begin[row(r)] && first_key + column <= s.own[row(r)];
            });
          }
        }
      }
    }
    ptx::copy_async_wait<0>();
  }

  // A step's share of the exponentials of 16 columns.
  __device__ __forceinline__ void add_share(const Products& d, int step) {
#pragma unroll
    for (int n = 0; n < kProducts / R::kSteps; ++n) softmax.add(d, step * (kProducts / R::kSteps) + n, p.scale_log2);
  }

  // The sinks: those of the batch row's far rows that the tile sees, by 64.
  __device__ void far_rows() {
    const int num_far = p.num_far[lane.b];
    if (num_far == 0) return;
    if (p.has_far_rotary) load_queries(p.q_far, p.q_far_strides);
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
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) at += s.far_count[w];
        count += s.far_count[w];
      }
      if (is_seen) s.far_row[at] = far_row, s.far_begin[at] = begin, s.far_end[at] = end;
      __syncthreads();
#pragma unroll 1
      for (int block = 0; block < count; block += kBlockRows) {
        R::copy(stage(0), [&](int row) -> const T* {
          return block + row < count ? k + s.far_row[block + row] * p.k_far_strides.seq : nullptr;
        });
        ptx::copy_async_commit();
        ptx::copy_async_wait<0>();
        __syncthreads();
#pragma unroll 1
        for (int part = 0; part < kBlockRows / kColumns && block + part * kColumns < count; ++part) {
          Products d;
          R::multiply(d, a, stage(0), part, [](int) {});
          forget_shared_memory();
          softmax.add_masked(d, p.scale_log2, [&](int r, int column) {
            const int n = block + part * kColumns + column, query = s.own[row(r)] - p.num_carried;
            return n < count && s.own[row(r)] >= 0 && s.far_begin[n] <= query && query < s.far_end[n];
          });
        }
        __syncthreads();
      }
    }
  }

  __device__ void run() {
    describe_rows();
#pragma unroll 1
    for (int running_maximum = 0; running_maximum < 2; ++running_maximum) {
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) softmax.maximum[r] = -INFINITY, softmax.sum[r] = 0;
      load_queries(p.q, p.q_strides);
      band(running_maximum != 0);
      far_rows();
      bool fits = true;
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        softmax.sum[r] = quad_sum(softmax.sum[r]);
        fits &= s.own[row(r)] < 0 || softmax.sum[r] < kLargestSum;
      }
      if (__syncthreads_and(fits)) break;
    }
    float* const lse2 = p.lse2 + (lane.lane * p.seqlen_q + first) * p.group;
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (warp_lane % 4 == 0 && s.own[row(r)] >= 0) lse2[row(r)] = softmax.maximum[r] + log2f(softmax.sum[r]);
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 64 ? 3 : 2) lse_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<typename LseTile<T, kHeadDim>::Shared*>(memory);
  LseTile<T, kHeadDim>(p, s, blockIdx.x / p.num_query_tiles, blockIdx.x % p.num_query_tiles).run();
}

}  // namespace sparsek::cuda::mass
