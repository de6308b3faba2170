// Second pass of window_mass: column sums over the older half. A CTA has 128 keys in registers and passes the stacked
// rows of their queries through shared memory, so that a key's sum stays in one quad of threads: nothing is added
// between CTAs, and the sums come out the same every time.
#pragma once
#include "kernels/cuda/window_mass/tiles.cuh"

namespace sparsek::cuda::mass {

template <int kBlockBytes>
struct MassShared {
  uint8_t blocks[kStages][kBlockBytes];
  float lse2[kStages][kBlockRows];
  int32_t window_begin[kStages][kBlockRows];
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
  uint32_t a[2][R::kSteps][4];
  float sum[4];  // of keys 16 m + lane / 4 + 8 h of the warp's, at [2 m + h]

  __device__ MassTile(const Problem& p, Shared& s, int64_t lane, int tile)
      : p(p), s(s), lane(p, lane), first(tile * kTileRows), half_window(p.window_size / 2 + p.window_size % 2) {}

  __device__ uint32_t stage(int n) const { return ptx::shared_address(s.blocks[n % kStages]); }

  __device__ void load_keys() {
    const T* const k = lane.keys(p.k, p.k_strides);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = R::first_row(), key = first + n * kBlockRows;
      R::copy_steps(stage(n), row, k + (key + row) * p.k_strides.seq, R::kAtOnce * p.k_strides.seq, 0,
                    p.seqlen_k - key);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    R::load_tile(a, stage(0));
    __syncthreads();
  }

  // Where the n-th block of stacked rows begins: a position, and a head of its group.
  struct Place {
    int position, head;
  };
  __device__ __forceinline__ Place place_of(int first_query, int n) const {
    if (p.group == 1) return {first_query + n * kBlockRows, 0};
    const uint32_t offset = n * kBlockRows, later = offset / static_cast<uint32_t>(p.group);
    return {first_query + static_cast<int>(later), static_cast<int>(offset - later * p.group)};
  }

  // 16 stacked rows, by a thread's columns: their logits, and what is subtracted from them.
  struct Part {
    Products d;
    float2 shift[2];
  };
  __device__ __forceinline__ void load_shift(Part& part, const float* lse2) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) part.shift[n] = *reinterpret_cast<const float2*>(lse2 + n * 8 + warp_lane % 4 * 2);
  }
  __device__ __forceinline__ float weight(const Part& part, int n) const {
    const float2 shift = part.shift[column_of(n) / 2];
    return exp2_in_place(fmaf(part.d[n / 8][n / 4 % 2][n % 4], p.scale_log2, n % 2 == 0 ? -shift.x : -shift.y));
  }
  // A step's share of the weights.
  __device__ __forceinline__ void add_share(const Part& part, int step) {
#pragma unroll
    for (int n = 0; n < kProducts / R::kSteps; ++n) {
      const int product = step * (kProducts / R::kSteps) + n;
      sum[row_of(product)] += weight(part, product);
    }
  }
  __device__ __forceinline__ void add(const Part& part) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) sum[row_of(n)] += weight(part, n);
  }

  __device__ void sum_over(int first_query, int last_query) {
    const int num_stacked = (last_query - first_query + 1) * p.group,
              num_blocks = (num_stacked + kBlockRows - 1) / kBlockRows;
    const T* const q = lane.queries(p, p.q, p.q_strides);
    const float* const lse2 = p.lse2 + (lane.lane * p.seqlen_q + first_query) * p.group;
    const int32_t* const window_begin = p.window_begin + lane.b * p.seqlen_q;
    const auto copy = [&](int n) {
      if (n < num_blocks) {
        const Place place = place_of(first_query, n);
        R::copy_queries(p, stage(n), q, p.q_strides, place.position, place.head, last_query);
        const int row = threadIdx.x % kBlockRows, position = place.position + p.by_group(place.head + row);
        const bool is_there = position <= last_query;
        if (threadIdx.x < kBlockRows)
          ptx::copy_async_4(ptx::shared_address(&s.lse2[n % kStages][row]), lse2 + (is_there ? n * kBlockRows + row : 0),
                            is_there);
        else
          ptx::copy_async_4(ptx::shared_address(&s.window_begin[n % kStages][row]),
                            window_begin + (is_there ? position : 0), is_there);
      }
      ptx::copy_async_commit();
    };
    // By time: the position of this warp's first and last key, negative for carried ones.
    const int first_key = first + warp * kWarpRows, first_own = first_key - p.num_carried,
              last_own = first_own + kWarpRows - 1;
#pragma unroll
    for (int n = 0; n < kStages - 1; ++n) copy(n);
#pragma unroll 1
    for (int n = 0; n < num_blocks; ++n) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(n + kStages - 1);
      const float* const block_lse2 = s.lse2[n % kStages];
      const int32_t* const block_begin = s.window_begin[n % kStages];
      const Place place = place_of(first_query, n);
      const bool is_whole = (n + 1) * kBlockRows <= num_stacked;
      const int first_position = place.position,
                last_position = is_whole ? place.position + p.by_group(place.head + kBlockRows - 1) : last_query;
      const int last_column = (is_whole ? kBlockRows : num_stacked - n * kBlockRows) - 1;
      if (last_position - first_own < half_window || first_position - last_own >= p.window_size ||
          block_begin[0] > first_key + kWarpRows - 1) {
        continue;
      }
      const bool is_plain = is_whole && first_position - last_own >= half_window &&
                            last_position - first_own < p.window_size && block_begin[last_column] <= first_key;
      if (is_plain) {
        Part parts[2];
        R::multiply(parts[0].d, a, stage(n), 0, [](int) {});
#pragma unroll
        for (int part = 1; part < kBlockRows / kColumns; ++part) {
          Part& before = parts[(part - 1) % 2];
          load_shift(before, block_lse2 + (part - 1) * kColumns);
          R::multiply(parts[part % 2].d, a, stage(n), part, [&](int step) { add_share(before, step); });
        }
        load_shift(parts[1], block_lse2 + kBlockRows - kColumns);
        add(parts[1]);
      } else {
#pragma unroll 1
        for (int part = 0; part < kBlockRows / kColumns; ++part) {
          const int first_column = part * kColumns, end_column = min(first_column + kColumns, last_column + 1);
          if (end_column <= first_column) break;
          const int part_first = place.position + p.by_group(place.head + first_column),
                    part_last = place.position + p.by_group(place.head + end_column - 1);
          if (part_last - first_own < half_window || part_first - last_own >= p.window_size ||
              block_begin[first_column] > first_key + kWarpRows - 1) {
            continue;
          }
          Part current;
          load_shift(current, block_lse2 + first_column);
          R::multiply(current.d, a, stage(n), part, [](int) {});
          if (!(end_column == first_column + kColumns && part_first - last_own >= half_window &&
                part_last - first_own < p.window_size && block_begin[end_column - 1] <= first_key)) {
            // Keys that a thread's columns weigh lie between `least` and `most`.
            int least[4], most[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int column = first_column + c / 2 * 8 + warp_lane % 4 * 2 + c % 2,
                        position = place.position + p.by_group(place.head + column), own = position + p.num_carried;
              least[c] = max(block_begin[column], own - p.window_size + 1) - first_key - warp_lane / 4;
              most[c] = position <= last_query ? own - half_window - first_key - warp_lane / 4 : INT32_MIN;
            }
#pragma unroll
            for (int product = 0; product < kProducts; ++product) {
              const int key = row_of(product) / 2 * 16 + row_of(product) % 2 * 8, c = column_of(product);
              float& x = current.d[product / 8][product / 4 % 2][product % 4];
              x = key >= least[c] && key <= most[c] ? x : p.nothing;
            }
          }
          add(current);
        }
      }
    }
    ptx::copy_async_wait<0>();
  }

  __device__ void run() {
#pragma unroll
    for (int r = 0; r < 4; ++r) sum[r] = 0;
    const int last = min(first + kTileRows, p.seqlen_k) - 1;
    const int64_t first_query = max(int64_t{first} - p.num_carried + half_window, int64_t{0}),
                  last_query = min(int64_t{last} - p.num_carried + p.window_size - 1, int64_t{p.seqlen_q} - 1);
    if (first_query <= last_query) {
      load_keys();
      sum_over(static_cast<int>(first_query), static_cast<int>(last_query));
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int key = first + warp * kWarpRows + r / 2 * 16 + warp_lane / 4 + r % 2 * 8;
      const float total = quad_sum(sum[r]);
      if (warp_lane % 4 != 0 || key >= p.seqlen_k) continue;
      const int64_t at = lane.lane * p.seqlen_k + key;
      p.mass[at] = (p.mass_in == nullptr ? 0.0f : p.mass_in[at]) + total;
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 64 ? 3 : 2) mass_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<typename MassTile<T, kHeadDim>::Shared*>(memory);
  MassTile<T, kHeadDim>(p, s, blockIdx.x / p.num_key_tiles, blockIdx.x % p.num_key_tiles).run();
}

}  // namespace sparsek::cuda::mass
