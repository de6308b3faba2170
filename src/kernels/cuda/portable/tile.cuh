// A tile of query rows (positions x the group's heads) of one KV head, and the blocks of keys that it walks: first
// those of the window band, then those of its far rows.
#pragma once
#include "kernels/cuda/portable/far_rows.cuh"

namespace sparsek::cuda::portable {

// What of a tile is not worth registers.
template <int kRows>
struct TileShared {
  FarShared far;
  const void *k_rows, *k_far_rows, *v_rows;  // of the batch row and head
  const float* scores;
  uint32_t zero;
  int32_t band_begin, band_last, band_blocks;
  int32_t end;                    // blocks of a run without a pause end here
  int32_t candidate, candidates;  // where the run's far rows begin in the list; negative: a run without any
  FarCounts far_counts;
  int32_t warp_rows[kThreads / 32];  // how many of a warp's rows there are
  // What the rows of a warp see of the band: all of them [inner_low, inner_high], any of them [low, high].
  struct {
    int32_t low, high, inner_low, inner_high;
  } band[kThreads / 32];
  float tau[kRows];
  int32_t window_low[kRows], window_high[kRows];  // key rows that a tile row sees as its window
  int32_t position[kRows];                        // in the tile; 255: a row that is not there

  __device__ __forceinline__ bool warp_sees(int n, int first_key, uint32_t warp) const {
    return n < band_blocks ? first_key <= band[warp].high && first_key + kKeys > band[warp].low : warp_rows[warp] > 0;
  }
  __device__ __forceinline__ bool has_window_edge(int first_key, uint32_t warp) const {
    return first_key < band[warp].inner_low || first_key + kKeys - 1 > band[warp].inner_high;
  }
  // Of block n: its first key row in the band, or its first place in the far rows.
  __device__ __forceinline__ int first_key(int n) const {
    return n < band_blocks ? band_begin + n * kKeys : (n - band_blocks) * kKeys;
  }
};

// Which queries a CTA has: the last ones first. Made anew where it is needed (with hidden()).
template <int kRows>
struct Tile {
  int head, b, kv, first, last, num_rows;
  __device__ __forceinline__ Tile(const Problem& p, uint32_t zero) {
    const int block = static_cast<int>(blockIdx.x ^ zero);
    const int lanes = p.fwd.batch * p.fwd.num_kv_heads, positions = kRows / 64 * p.positions_per_step;
    head = block % lanes, b = head / p.fwd.num_kv_heads, kv = head % p.fwd.num_kv_heads;
    first = ((p.fwd.seqlen_q + positions - 1) / positions - 1 - block / lanes) * positions;
    last = min(first + positions, p.fwd.seqlen_q) - 1;
    num_rows = (last - first + 1) * p.group;
  }
  // A row of a [batch, seqlen_q, num_heads, head_dim] tensor.
  __device__ __forceinline__ int64_t row_offset(const Strides& strides, int row, const Problem& p) const {
    const int position = divide_row(row, p.group_inverse);
    return b * strides.batch + (first + position) * strides.seq +
           (int64_t{kv} * p.group + row - position * p.group) * strides.head;
  }
};

template <class T, int kRows>
__device__ __forceinline__ void describe_tile(TileShared<kRows>& s, const Problem& p) {
  const AttentionFwdParams& f = p.fwd;
  const Tile<kRows> tile(p, 0);
  const int thread = threadIdx.x;
  if (thread < kRows) {
    const int position = divide_row(thread, p.group_inverse), i = tile.first + position;
    const bool valid = thread < tile.num_rows;
    s.position[thread] = valid ? position : 255;
    s.window_low[thread] = valid ? f.window_begin[static_cast<int64_t>(tile.b) * f.seqlen_q + i] : INT32_MAX;
    s.window_high[thread] = valid ? f.num_carried + i : -1;
    s.tau[thread] = valid ? static_cast<const float*>(f.tau)[static_cast<int64_t>(tile.head) * f.seqlen_q + i] : 0.0f;
  }
  __syncthreads();
  if (thread == 0) {
    s.k_rows = static_cast<const T*>(f.k) + tile.b * f.k_strides.batch + tile.kv * f.k_strides.head;
    if (f.k_far != nullptr)
      s.k_far_rows = static_cast<const T*>(f.k_far) + tile.b * f.k_far_strides.batch + tile.kv * f.k_far_strides.head;
    s.v_rows = static_cast<const T*>(f.v) + tile.b * f.v_strides.batch + tile.kv * f.v_strides.head;
    s.scores = static_cast<const float*>(f.scores) + static_cast<int64_t>(tile.head) * f.seqlen_k;
    s.band_begin = s.window_low[0], s.band_last = f.num_carried + tile.last;
    s.band_blocks = (s.band_last - s.band_begin) / kKeys + 1;
    s.zero = 0;
  }
  if (thread % 32 == 0) {
    constexpr int kWarpRows = kRows / (kThreads / 32);
    const int warp = thread / 32, row = warp * kWarpRows, last_row = min(row + kWarpRows, tile.num_rows) - 1;
    s.band[warp] = {INT32_MAX, -1, 0, 0};  // sees nothing
    if (row < tile.num_rows)
      s.band[warp] = {s.window_low[row], s.window_high[last_row], s.window_low[last_row], s.window_high[row]};
    s.warp_rows[warp] = max(0, tile.num_rows - row);
  }
  __syncthreads();
}

// Candidates [from, from + kRound) of the tile's list; the next run ends with their blocks. Nobody reads `s` when it
// begins; a barrier must follow. is_gated: weights below 1 matter.
template <int kRows>
__device__ __forceinline__ void gather_blocks(TileShared<kRows>& s, const Problem& p, int from, bool is_gated) {
  const uint32_t zero = hidden(0, s.zero);
  const Tile<kRows> tile(p, zero);
  const int64_t list = static_cast<int64_t>(tile.head) * p.num_chunks + tile.first / p.chunk;
  const int count = p.live.count[list];
  const FarCounts counts = gather_far_rows(s.far, p.live.rows + list * p.live.capacity, from, count, tile.first,
                                           tile.last, s.tau[tile.num_rows - 1], is_gated, threadIdx.x ^ zero);
  if (threadIdx.x == 0) {
    s.far_counts = counts, s.candidate = from, s.candidates = count;
    s.end = s.band_blocks + (counts.all + kKeys - 1) / kKeys;
  }
}

// Before the first run. With far rotary the band is a run of its own, because the far rows have their own queries.
template <int kRows>
__device__ __forceinline__ void begin_runs(TileShared<kRows>& s, const Problem& p, bool is_gated) {
  gather_blocks(s, p, 0, is_gated);
  if (p.fwd.q_far != nullptr && threadIdx.x == 0) s.end = s.band_blocks, s.candidate = -kRound;
  __syncthreads();
}
// The next run: false when there is none. `n` is where the last one ended and becomes where it begins; `on_far` is
// called between two barriers when the queries change.
template <int kRows, class OnFar>
__device__ __forceinline__ bool next_run(TileShared<kRows>& s, const Problem& p, bool is_gated, int& n, OnFar on_far) {
  const int candidate = s.candidate + kRound;
  if (candidate > 0 && candidate >= s.candidates) return false;
  __syncthreads();
  if (candidate == 0) {
    on_far();
    if (threadIdx.x == 0) s.candidate = 0, s.end = n + (s.far_counts.all + kKeys - 1) / kKeys;
  } else {
    n = s.band_blocks;
    gather_blocks(s, p, candidate, is_gated);
  }
  __syncthreads();
  return true;
}

// Copies a block's rows of K (is_k) or V. A row's stride is below 2^32 bytes.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void load_keys(void* to, const TileShared<kRows>& s, const Problem& p, int n, bool is_k) {
  const RowCopy<kHeadDim> copy(hidden(threadIdx.x, s.zero));
  const auto all = [](uint32_t) { return 16u; };
  if (n < s.band_blocks) {
    const int block = s.band_begin + n * kKeys, band_last = s.band_last;
    const auto* const tensor = static_cast<const uint8_t*>(is_k ? s.k_rows : s.v_rows);
    const auto stride = static_cast<uint32_t>((is_k ? p.fwd.k_strides : p.fwd.v_strides).seq * 2);
    copy.template copy<kKeys>(
        to,
        [&](uint32_t row, uint32_t, uint32_t) {
          return tensor +
                 static_cast<uint64_t>(static_cast<uint32_t>(min(block + static_cast<int>(row), band_last))) * stride;
        },
        all);
  } else {
    const bool has_far_keys = is_k && p.fwd.k_far != nullptr;
    const int32_t* const rows = s.far.row + (n - s.band_blocks) * kKeys + copy.first_row;
    const auto* const tensor = static_cast<const uint8_t*>(has_far_keys ? s.k_far_rows : is_k ? s.k_rows : s.v_rows);
    const auto stride = static_cast<uint32_t>((has_far_keys ? p.fwd.k_far_strides
                                               : is_k       ? p.fwd.k_strides
                                                            : p.fwd.v_strides)
                                                  .seq *
                                              2);
    uint4 four{};
    copy.template copy<kKeys>(
        to,
        [&](uint32_t, uint32_t pass, uint32_t j) {
          if (j == 0) four = *reinterpret_cast<const uint4*>(rows + pass * copy.kPass);
          return tensor + static_cast<uint64_t>(j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w) * stride;
        },
        all);
  }
}
// And the scores of a block of far rows.
template <int kRows>
__device__ __forceinline__ void load_scores(float* to, const TileShared<kRows>& s, int n) {
  const uint32_t key = hidden(threadIdx.x, s.zero);
  if (n >= s.band_blocks && key < kKeys)
    ptx::copy_async_4(ptx::shared_address(to + key), s.scores + s.far.row[(n - s.band_blocks) * kKeys + key]);
}

}  // namespace sparsek::cuda::portable
