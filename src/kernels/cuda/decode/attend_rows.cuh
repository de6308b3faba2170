// What a CTA of the attention reads (attend.cuh): which rows a tile shows, where they stand, and their loads.
#pragma once
#include "kernels/cuda/decode/plan.cuh"
#include "kernels/cuda/ptx/instructions.cuh"

namespace sparsek::cuda::decode {

// Sinks, ring or slots. A visible row of them is read where it stands, except one that is about to change; that one,
// and what nobody sees and may hold anything, are read from one other place: the new token, or in slots, when the key
// that leaves the window takes one, that key.
struct Region {
  const uint16_t *k, *v, *other_k, *other_v;
  int32_t first_tile, num_rows, other_row;  // other_row < 0: none
};

struct Facts {
  Region regions[3];
  const float* slot_scores;  // of the unit, as the two below
  const int64_t* slot_positions;
  float* logits;         // of the first head
  int64_t first_result;  // of the split's, in Problem::stats and values
  int num_heads;
  int new_row, end;  // of the split's tiles
  int slots_full;
  float candidate, tau;
  bool has_near[kWarps];
};

template <int kDim, int kHeadTiles>
struct AttendShared {
  union {
    PlanShared plan;
    float values[kWarps][kHeadTile][kDim + 4];  // by warp, one head tile at a time
  };
  volatile Facts facts;                         // volatile: not to live in registers
  uint4 q[2][kHeadTiles][kDim / 32][32];        // near, far: fragments
  float u[kWarps][kTileRows];                   // of the slots in a warp's tile
  float2 near[kWarps][kHeadTiles * kHeadTile];  // maximum and sum without slots
  float2 all[kWarps][kHeadTiles * kHeadTile];
};

// Of a tile's 16 rows, a bit each: which are visible, and which of them are read where they stand.
struct Visible {
  uint32_t bits;
  __device__ bool any() const { return (bits & 0xffffu) != 0; }
  __device__ bool row(int n) const { return bits >> n & 1; }
  __device__ bool direct(int n) const { return bits >> (16 + n) & 1; }
};

template <int kDim, int kHeadTiles>
struct AttendRows {
  using Shared = AttendShared<kDim, kHeadTiles>;
  static constexpr int kChunks = kDim / 32;  // of 8 dimensions a thread, in a row of K
  static constexpr int kSpans = kDim / 64;   // likewise of V

  const Problem& p;
  Shared& s;
  const int unit, batch_row, kv_head, split, first_head, num_heads;  // heads of the group: [first_head, + num_heads)
  const int t = threadIdx.x, warp = threadIdx.x / 32, g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  uint4 k[2][kChunks], v[4][kSpans];

  __device__ AttendRows(const Problem& problem, Shared& shared, int unit, int split, int part)
      : p(problem),
        s(shared),
        unit(unit),
        batch_row(unit / p.params.num_kv_heads),
        kv_head(unit % p.params.num_kv_heads),
        split(split),
        first_head(part * kHeadTiles * kHeadTile),
        num_heads(min(p.group - first_head, kHeadTiles * kHeadTile)) {}

  // Fragments of the queries, near and (with far rotary) far; heads that are not there are zero.
  static constexpr int kQueryPieces = 2 * kHeadTiles * kChunks * 32,
                       kQueriesEach = (kQueryPieces + kThreads - 1) / kThreads;
  __device__ uint4 query_piece(int n) const {
    const DecodeStepParams& params = p.params;
    const int lane = n & 31, chunk = n / 32 % kChunks, tile = n / (32 * kChunks) % kHeadTiles,
              far = n / (32 * kChunks * kHeadTiles), head = tile * kHeadTile + (lane >> 2);
    if (n >= kQueryPieces || head >= num_heads) return {};
    const int query_head = kv_head * p.group + first_head + head;
    const uint16_t* row =
        far && params.q_far
            ? row_of(params.q_far, batch_row, params.q_far_stride_batch, query_head, params.q_far_stride_head)
            : row_of(params.q, batch_row, params.q_stride_batch, query_head, params.q_stride_head);
    return *reinterpret_cast<const uint4*>(row + chunk * 32 + (lane & 3) * 8);
  }

  __device__ int region_of(int tile) const { return (tile >= p.sink_tiles) + (tile >= p.first_slot_tile); }

  // By the first threads, once the plan is known.
  __device__ void describe_regions(const Plan& plan, int end) {
    const DecodeStepParams& params = p.params;
    const int64_t unit_rows = unit * p.state_rows() * kDim;
    const auto* state_k = static_cast<const uint16_t*>(params.state_k) + unit_rows;
    const auto* state_v = static_cast<const uint16_t*>(params.state_v) + unit_rows;
    const int64_t window = params.window_size, sinks = params.num_sinks;
    if (t < 3) {
      const int64_t first_row = t == 0 ? 0 : t == 1 ? sinks : sinks + window;
      volatile Region& region = s.facts.regions[t];
      region.k = t == 1 && params.ring_k ? static_cast<const uint16_t*>(params.ring_k) + int64_t{unit} * window * kDim
                                         : state_k + first_row * kDim;
      region.v = state_v + first_row * kDim;
      if (t == 2 && plan.slot >= 0) {
        region.other_k = state_k + (sinks + plan.new_row) * kDim;
        region.other_v = state_v + (sinks + plan.new_row) * kDim;
      } else {
        region.other_k = row_of(params.k, batch_row, params.k_stride_batch, kv_head, params.k_stride_head);
        region.other_v = row_of(params.v, batch_row, params.v_stride_batch, kv_head, params.v_stride_head);
      }
      region.first_tile = t == 0 ? 0 : t == 1 ? p.sink_tiles : p.first_slot_tile;
      // Sinks outside the window; the ring's rows in use; slots.
      const int64_t rows = t == 0   ? min(max(plan.length + 1 - window, int64_t{0}), sinks)
                           : t == 1 ? min(plan.length + 1, window)
                                    : int64_t{params.topk};
      region.num_rows = static_cast<int>(rows);
      region.other_row = t == 0 ? -1 : t == 1 ? plan.new_row : plan.slot;
    }
    if (t == 3) {
      s.facts.new_row = plan.new_row, s.facts.end = end;
      s.facts.first_result = (int64_t{unit} * p.num_splits + split) * p.group + first_head;
      s.facts.num_heads = num_heads;
      s.facts.slots_full = plan.num_pooled >= params.topk;
      s.facts.candidate = plan.candidate, s.facts.tau = plan.tau;
      s.facts.slot_scores = p.slot_scores(unit), s.facts.slot_positions = p.slot_positions(unit);
      s.facts.logits = p.logits + (int64_t{unit} * p.group + first_head) * params.window_size;
    }
    if (t < kWarps) s.facts.has_near[t] = false;
  }

  // All lanes get the same.
  __device__ Visible visible(int tile) const {
    const volatile Region& region = s.facts.regions[region_of(tile)];
    const int first = (tile - region.first_tile) * kTileRows, rows = region.num_rows - first,
              other = region.other_row - first;
    uint32_t seen = rows >= kTileRows ? 0xffffu : rows <= 0 ? 0u : (1u << rows) - 1;
    const uint32_t other_bit = other >= 0 && other < kTileRows ? 1u << other : 0u;
    if (tile >= p.first_slot_tile && !s.facts.slots_full) {
      const int n = t & 15;
      const bool used = n < rows && s.facts.slot_positions[first + n] >= 0;
      seen = (__ballot_sync(0xffffffffu, used) & 0xffffu) | other_bit;
    }
    return {seen | (seen & ~other_bit) << 16};
  }

  __device__ void load_k(int tile, Visible see) {
    const volatile Region& region = s.facts.regions[region_of(tile)];
    const int first = (tile - region.first_tile) * kTileRows;
    const uint16_t *base = region.k + int64_t{first} * kDim, *other = region.other_k;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = g + 8 * half;
      const uint16_t* row = (see.direct(n) ? base + n * kDim : other) + 8 * c;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) k[half][chunk] = ptx::load_once(row + 32 * chunk);
    }
    const int n = t & 31;
    if (tile < p.first_slot_tile || n >= kTileRows) return;
    if (see.direct(n)) {
      ptx::copy_async_4(ptx::shared_address(&s.u[warp][n]), s.facts.slot_scores + first + n);
    } else {
      s.u[warp][n] = s.facts.candidate;
    }
  }
  __device__ void load_v(int tile, Visible see) {
    const volatile Region& region = s.facts.regions[region_of(tile)];
    const int first = (tile - region.first_tile) * kTileRows;
    const uint16_t *base = region.v + int64_t{first} * kDim, *other = region.other_v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * c + (i & 1) + 8 * (i >> 1);
      const uint16_t* row = (see.direct(n) ? base + n * kDim : other) + 8 * g;
#pragma unroll
      for (int span = 0; span < kSpans; ++span) v[i][span] = ptx::load_once(row + 64 * span);
    }
  }
  // The warp's first tiles, while the plan is made.
  __device__ void prefetch_tiles(int begin, int end) const {
    constexpr int kAhead = 2, kLines = (kDim * 2 + 127) / 128;  // of 128 bytes, in a row
    const DecodeStepParams& params = p.params;
    const int lane = t & 31, sinks = params.num_sinks, window = params.window_size;
    const auto* state_k = static_cast<const uint16_t*>(params.state_k);
    const auto* state_v = static_cast<const uint16_t*>(params.state_v);
    const auto* ring_k = static_cast<const uint16_t*>(params.ring_k);
#pragma unroll 1
    for (int tile = begin + warp; tile < min(end, begin + kAhead * kWarps); tile += kWarps) {
      const int region = region_of(tile);
      const int row = (tile - (region == 0   ? 0
                               : region == 1 ? p.sink_tiles
                                             : p.first_slot_tile)) *
                          kTileRows +
                      lane / kLines;
      if (lane / kLines >= kTileRows || row >= (region == 0 ? sinks : region == 1 ? window : params.topk)) continue;
      const int64_t place =
          (unit * p.state_rows() + row + (region > 0 ? sinks : 0) + (region > 1 ? window : 0)) * kDim +
          lane % kLines * 64;
      ptx::prefetch_to_l2(region == 1 && ring_k
                              ? ring_k + (int64_t{unit} * window + row) * kDim + lane % kLines * 64
                              : state_k + place);
      ptx::prefetch_to_l2(state_v + place);
    }
  }

  // The first tile from `tile` on that shows the warp something.
  __device__ int next_tile(int tile, Visible& see) const {
#pragma unroll 1
    for (; tile < s.facts.end; tile += kWarps) {
      see = visible(tile);
      if (see.any()) break;
    }
    return tile;
  }
};

}  // namespace sparsek::cuda::decode
