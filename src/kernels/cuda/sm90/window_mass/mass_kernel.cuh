// Second pass of window_mass on Hopper: as ../../window_mass/mass_kernel.cuh, which see.
#pragma once
#include "kernels/cuda/sm90/window_mass/tiles.cuh"

namespace sparsek::cuda::mass::sm90 {

constexpr int kRowStages = 4;  // of what is read after a turn: at least one more than kStages

template <int kBlockBytes>
struct MassShared {
  uint8_t tile[kBlockBytes];
  uint8_t blocks[kStages][kBlockBytes];
  float lse2[kRowStages][kTileRows];
  int32_t window_begin[kRowStages][kTileRows];
};

template <class T, int kHeadDim>
struct MassTile {
  using R = Rows<T, kHeadDim>;
  using Shared = MassShared<R::kBytes>;
  const Problem& p;
  Shared& s;
  const Lane<T> lane;
  const int first;  // row of the tile's first key
  const int half_window;
  const int warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32;
  float sum[2];  // of the thread's keys

  __device__ MassTile(const Problem& p, Shared& s, int64_t lane, int tile)
      : p(p), s(s), lane(p, lane), first(tile * kTileRows), half_window(p.window_size / 2 + p.window_size % 2) {}

  __device__ uint32_t stage(int n) const { return ptx::shared_address(s.blocks[n % kStages]); }
  __device__ uint32_t tile() const { return ptx::shared_address(s.tile); }

  // The weights of 16 stacked rows.
  __device__ __forceinline__ void add(const float (&d)[8], const float* lse2) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 shift = *reinterpret_cast<const float2*>(lse2 + n * 8 + warp_lane % 4 * 2);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += ptx::exp2_approx(fmaf(d[n * 4 + h * 2], p.scale_log2, -shift.x));
        sum[h] += ptx::exp2_approx(fmaf(d[n * 4 + h * 2 + 1], p.scale_log2, -shift.y));
      }
    }
  }

  __device__ void sum_over(int first_query, int last_query) {
    const int num_stacked = (last_query - first_query + 1) * p.group,
              num_blocks = (num_stacked + kTileRows - 1) / kTileRows;
    const T* const q = lane.queries(p, p.q, p.q_strides);
    const float* const lse2 = p.lse2 + (lane.lane * p.seqlen_q + first_query) * p.group;
    const int32_t* const window_begin = p.window_begin + lane.b * p.seqlen_q;
    // A block's first position, and how far into that position's heads it begins.
    struct Place {
      int position, head;
    };
    const auto place_of = [&](int n) -> Place {
      if (p.group == 1) return {first_query + n * kTileRows, 0};
      const uint32_t offset = n * kTileRows, later = offset / static_cast<uint32_t>(p.group);
      return {first_query + static_cast<int>(later), static_cast<int>(offset - later * p.group)};
    };
    const auto copy = [&](int n) {
      const Place place = place_of(n);
      R::copy_queries(p, stage(n), q, p.q_strides, place.position, place.head, last_query);
      const int row = threadIdx.x % kTileRows, position = place.position + p.by_group(place.head + row);
      const bool is_there = position <= last_query;
      if (threadIdx.x < kTileRows)
        ptx::copy_async_4(ptx::shared_address(&s.lse2[n % kRowStages][row]),
                          lse2 + (is_there ? n * kTileRows + row : 0), is_there);
      else
        ptx::copy_async_4(ptx::shared_address(&s.window_begin[n % kRowStages][row]),
                          window_begin + (is_there ? position : 0), is_there);
      ptx::copy_async_commit();
    };
    // By time: positions of this warp's first and last key, and of its warpgroup's, negative for carried ones.
    const int first_key = first + warp * kWarpRows, first_own = first_key - p.num_carried,
              last_own = first_own + kWarpRows - 1;
    const int group_key = first + warp / 4 * 64, group_first = group_key - p.num_carried, group_last = group_first + 63;
    copy(0);
    wait_for_copies();
#pragma unroll 1
    for (int n = 0; n < num_blocks; ++n) {
      const bool is_last = n + 1 == num_blocks;
      take_turn(n);
      if (!is_last) copy(n + 1);
      const float* const block_lse2 = s.lse2[n % kRowStages];
      const int32_t* const block_begin = s.window_begin[n % kRowStages];
      const Place place = place_of(n);
      const int num_columns = min(num_stacked - n * kTileRows, kTileRows);
      const auto position_of = [&](int column) { return place.position + p.by_group(place.head + column); };
      if (position_of(num_columns - 1) - group_first < half_window || place.position - group_last >= p.window_size ||
          block_begin[0] > group_key + 63) {
        pass_turn(is_last);
        continue;
      }
      float d[64];
      R::multiply(d, tile(), stage(n));
      pass_turn(is_last);
      if (num_columns == kTileRows && place.position - last_own >= half_window &&
          position_of(kTileRows - 1) - first_own < p.window_size && block_begin[kTileRows - 1] <= first_key) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          add(*reinterpret_cast<const float(*)[8]>(&d[part * 8]), block_lse2 + part * kColumns);
        }
        continue;
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int first_column = part * kColumns, last_column = min(first_column + kColumns, num_columns) - 1;
        if (last_column < first_column) continue;
        const int first_position = position_of(first_column), last_position = position_of(last_column);
        if (last_position - first_own < half_window || first_position - last_own >= p.window_size ||
            block_begin[first_column] > first_key + kWarpRows - 1) {
          continue;
        }
        const bool is_plain = last_column == first_column + kColumns - 1 && first_position - last_own >= half_window &&
                              last_position - first_own < p.window_size && block_begin[last_column] <= first_key;
        if (!is_plain) {
          // Keys that a column weighs lie between `least` and `most`.
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int column = first_column + c / 2 * 8 + warp_lane % 4 * 2 + c % 2, own = position_of(column) + p.num_carried,
                      key = first_key + warp_lane / 4;
            const int least = max(block_begin[column], own - p.window_size + 1) - key,
                      most = column < num_columns ? own - half_window - key : INT32_MIN;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& x = d[part * 8 + c / 2 * 4 + h * 2 + c % 2];
              x = 8 * h >= least && 8 * h <= most ? x : p.nothing;
            }
          }
        }
        add(*reinterpret_cast<const float(*)[8]>(&d[part * 8]), block_lse2 + first_column);
      }
    }
  }

  __device__ void run() {
    sum[0] = sum[1] = 0;
    const int last = min(first + kTileRows, p.seqlen_k) - 1;
    const int64_t first_query = max(int64_t{first} - p.num_carried + half_window, int64_t{0}),
                  last_query = min(int64_t{last} - p.num_carried + p.window_size - 1, int64_t{p.seqlen_q} - 1);
    if (first_query <= last_query) {
      const int row = R::first_row();
      R::copy_steps(tile(), row, lane.keys(p.k, p.k_strides) + (int64_t{first} + row) * p.k_strides.seq,
                    R::kAtOnce * p.k_strides.seq, 0, p.seqlen_k - first);
      sum_over(static_cast<int>(first_query), static_cast<int>(last_query));
    }
    for (int h = 0; h < 2; ++h) {
      const int key = first + warp * kWarpRows + warp_lane / 4 + 8 * h;
      const float total = quad_sum(sum[h]);
      if (warp_lane % 4 != 0 || key >= p.seqlen_k) continue;
      const int64_t at = lane.lane * p.seqlen_k + key;
      p.mass[at] = (p.mass_in == nullptr ? 0.0f : p.mass_in[at]) + total;
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) window_mass_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<typename MassTile<T, kHeadDim>::Shared*>(memory);
  MassTile<T, kHeadDim>(p, s, blockIdx.x / p.num_key_tiles, blockIdx.x % p.num_key_tiles).run();
}

}  // namespace sparsek::cuda::mass::sm90
