// What attention's forward and dq kernels share on Hopper: tiles of query rows, the union of far rows of a tile, and
// the warps that load blocks of keys for the others.
#pragma once
#include <cuda.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/sm90/shape.h"

namespace sparsek::cuda::sm90 {

struct FwdParams {
  CUtensorMap k_map, v_map;      // [batch, heads, rows, head_dim], boxes of 128 rows x 64
  CUtensorMap q_map, q_far_map;  // [batch, positions, heads, head_dim], boxes of positions_per_tile x group x 64
  const Bits16 *q, *k, *v, *q_far, *k_far;
  const float *scores, *tau;
  const int32_t *window_begin, *far_begin, *far_end;
  Bits16* out;
  float* lse;
  const LiveRow* live;        // [batch * num_kv_heads, num_chunks, live_capacity]
  const int32_t* live_count;  // [batch * num_kv_heads, num_chunks]
  int64_t q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, o_batch, o_seq, o_head;
  int64_t qf_batch, qf_seq, qf_head, kf_batch, kf_seq, kf_head;
  int32_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, group, positions_per_tile;
  int32_t num_chunks, chunk, live_capacity;  // chunk: a multiple of positions_per_tile
  float scale_log2;
  bool soft, far;  // which kernel; not read by it
};

constexpr int kChunk = 1024;        // queries that share a list of far rows, at most
constexpr float kMaxGrowth = 8.0f;  // the running maximum may lag by this many powers of two

// What loader, builder and consumers share: kQueries tiles of query rows, kStagesK_ stages of K, kStagesV_ of V. Of the
// loading threads the first kBandLoaders_ load the band.
template <class ShapeType, int kQueries, int kMaxUnion_, int kStagesK_, int kStagesV_, int kBandLoaders_>
struct __align__(1024) LoaderShared {
  using Shape = ShapeType;
  static constexpr int kStagesK = kStagesK_, kStagesV = kStagesV_, kMaxUnion = kMaxUnion_, kNumQueries = kQueries,
                       kLoaders = 128, kBandLoaders = kBandLoaders_;
  uint8_t q[kQueries][Shape::kTileBytes];
  uint8_t k[kStagesK][Shape::kTileBytes];
  uint8_t v[kStagesV][Shape::kTileBytes];
  // Union of the far rows of a tile, padded to whole blocks; two of them, the next tile's is built meanwhile.
  int32_t row[2][kMaxUnion];
  float u[2][kMaxUnion];
  uint16_t interval[2][kMaxUnion];  // visible at the tile's queries [low byte, low byte + high byte)
  int32_t warp_count[2][3];
  int32_t num_plain[2], num_full[2], num_far[2];
  float cut[2];  // NaN where the union has no room for some of its rows, else 0
  uint64_t q_full, q_empty, union_full[2], union_empty[2], k_full[kStagesK], k_empty[kStagesK], v_full[kStagesV],
      v_empty[kStagesV];

  __device__ void initialise() {
    ptx::barrier_init(&q_full, 1);
    ptx::barrier_init(&q_empty, 8);
    for (auto& barrier : union_full) ptx::barrier_init(&barrier, 64);
    for (auto& barrier : union_empty) ptx::barrier_init(&barrier, 8);
    for (auto& barrier : k_full) ptx::barrier_init(&barrier, kLoaders);
    for (auto& barrier : v_full) ptx::barrier_init(&barrier, kLoaders);
    for (auto& barrier : k_empty) ptx::barrier_init(&barrier, 8);
    for (auto& barrier : v_empty) ptx::barrier_init(&barrier, 8);
    ptx::fence_barrier_init();
  }
};
// The most far rows of a tile's union, padded to a block: what fits beside the tiles of head_dim 128.
constexpr int kMaxUnionForward = 2304, kMaxUnionOthers = 1664;

// The union's last block is of 64 keys where that is enough (and it is not the only one).
constexpr int kTail = 64;
__device__ __forceinline__ bool has_tail(int num_far) {
  return num_far > kBlock && (num_far - 1) % kBlock < kTail;
}
__device__ __forceinline__ int whole_blocks(int num_far) {
  return (num_far + kBlock - 1) / kBlock - has_tail(num_far);
}

// Byte offset of 16-byte piece `chunk` of row `row` in a tile.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>((chunk >> 3) * (kTile * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4));
}

struct Tile {
  int first, last;  // query positions
  int b, kv;
  int band_begin, band_rows;
  __device__ Tile(const FwdParams& p, int index) {
    const int tiles = (p.seqlen_q + p.positions_per_tile - 1) / p.positions_per_tile;
    const int heads = p.batch * p.num_kv_heads;
    const int head = index % heads;
    first = (tiles - 1 - index / heads) * p.positions_per_tile;  // the longest tiles first
    last = min(first + p.positions_per_tile, p.seqlen_q) - 1;
    b = head / p.num_kv_heads;
    kv = head % p.num_kv_heads;
    band_begin = p.window_begin[static_cast<int64_t>(b) * p.seqlen_q + first];
    band_rows = p.num_carried + last + 1 - band_begin;
  }
};

// The tile of this CTA's round: every other round runs backwards, so that a CTA's tiles add up to about the same work.
__device__ __forceinline__ int tile_of_round(int round) {
  const int place = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return round * gridDim.x + place;
}

// A place in a ring of stages and the parity of its barriers there.
template <int kCount>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

// Two warps of the last warpgroup: the union of far rows of each tile, one tile ahead. Rows every query of the
// tile sees at weight 1 come first, then those all see at lower weights, then the others.
template <bool kSoft, typename SharedType>
struct Builder {
  const FwdParams& p;
  SharedType& s;
  __device__ void sync() { asm volatile("bar.sync 1, 64;" ::: "memory"); }

  __device__ void build(const Tile& t, int buffer) {
    const int lane = ptx::lane(), warp = ptx::thread() >> 5 & 1;
    const int64_t list = (static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv) * p.num_chunks + t.first / p.chunk;
    const int candidates = p.live_count[list];
    const int4* live_rows = reinterpret_cast<const int4*>(p.live + list * p.live_capacity);
    const float tau_last = kSoft ? p.tau[(static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv) * p.seqlen_q + t.last] : 0;
    const int half = (candidates + 63) / 64 * 32;
    const int from = warp * half, to = min(candidates, from + half);
    int at[3] = {0, 0, 0};
    constexpr int kUnroll = kSoft ? 2 : 1;  // what the registers hold without spills
    const uint32_t before = (1u << lane) - 1;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll kUnroll
      for (int base = from; base < to; base += 32) {
        const int candidate = base + lane;
        int4 x{0, INT32_MAX, 0, 0};
        if (candidate < to) x = __ldg(live_rows + candidate);
        const bool visible = x.y <= t.last && x.z > t.first;
        const bool full = visible && x.y <= t.first && x.z > t.last;
        const bool plain = full && (!kSoft || __int_as_float(x.w) - tau_last >= 1.0f);
        const uint32_t votes[3] = {__ballot_sync(0xffffffffu, plain), __ballot_sync(0xffffffffu, full && !plain),
                                   __ballot_sync(0xffffffffu, visible && !full)};
        if (pass == 1 && visible) {
          const int kind = plain ? 0 : full ? 1 : 2;
          const int where = kind == 0   ? at[0] + __popc(votes[0] & before)
                            : kind == 1 ? at[1] + __popc(votes[1] & before)
                                        : at[2] + __popc(votes[2] & before);
          if (where < SharedType::kMaxUnion) {
            s.row[buffer][where] = x.x;
            const int begin = max(0, x.y - t.first);
            s.interval[buffer][where] = static_cast<uint16_t>(begin | (min(255, x.z - t.first) - begin) << 8);
            if (kSoft) s.u[buffer][where] = __int_as_float(x.w);
          }
        }
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) at[kind] += __popc(votes[kind]);
      }
      if (pass == 0) {
        if (lane == 0) {
#pragma unroll
          for (int kind = 0; kind < 3; ++kind) s.warp_count[warp][kind] = at[kind];
        }
        sync();
        int total = 0;
#pragma unroll
        for (int kind = 0; kind < 3; ++kind) {
          at[kind] = total + (warp == 1 ? s.warp_count[0][kind] : 0);
          total += s.warp_count[0][kind] + s.warp_count[1][kind];
          if (warp == 0 && lane == 0) {
            (kind == 0 ? s.num_plain : kind == 1 ? s.num_full : s.num_far)[buffer] = min(total, SharedType::kMaxUnion);
          }
        }
        // More than the caller's max_far promised (a selection that was not made with this topk) has no room.
        if (warp == 0 && lane == 0) s.cut[buffer] = total > SharedType::kMaxUnion ? NAN : 0.0f;
      }
    }
    sync();
    // Pad with a real row, seen by nobody.
    const int total = s.num_far[buffer];
    if (total > 0) {
      const int row = s.row[buffer][total - 1];
      for (int n = total + warp * 32 + lane; n < (total + kBlock - 1) / kBlock * kBlock; n += 64) {
        s.row[buffer][n] = row;
        s.interval[buffer][n] = 0;
        s.u[buffer][n] = 0;
      }
    }
  }
  __device__ void run(int total_tiles) {
    for (int done = 0, index; (index = tile_of_round(done)) < total_tiles; ++done) one(index, done);
  }
  __device__ void one(int index, int done) {
    ptx::barrier_wait(&s.union_empty[done & 1], ((done >> 1) & 1) ^ 1);
    build(Tile(p, index), done & 1);
    ptx::barrier_arrive(&s.union_full[done & 1]);
  }
};

// The first warpgroup (threads 0 to 127) fills the stages.
template <typename SharedType, bool kFar>
struct Loader {
  using Shape = typename SharedType::Shape;
  const FwdParams& p;
  SharedType& s;
  const CUtensorMap* q_maps[SharedType::kNumQueries];  // what goes to s.q
  uint32_t blocks = 0;                                 // loaded: their places in the rings of K and V follow from it

  template <int kStages>
  __device__ uint32_t stage() const {
    return blocks % kStages;
  }
  // A stage that was used before is free when the wait for this parity returns.
  template <int kStages>
  __device__ uint32_t empty_parity() const {
    return (blocks / kStages & 1) ^ 1;
  }

  // The first `keys` of a block. kPieces threads copy rows 4m .. 4m+3, each 16 bytes of every one; rows that a thread
  // copies at different times lie a multiple of 8 apart, so its swizzles are fixed.
  __device__ void gather(const Bits16* x, int stride_bytes, uint8_t* shared, const int32_t* rows, int keys) {
    constexpr int kStep = SharedType::kLoaders / Shape::kPieces * 4;  // rows that all copy at once
    const int thread = ptx::thread(), piece = thread % Shape::kPieces, first = thread / Shape::kPieces * 4;
    const char* source = reinterpret_cast<const char*>(x) + piece * 16;
    const uint32_t base = ptx::shared_address(shared) + (first & ~7) * 128;
#pragma unroll
    for (int n = 0; n < kBlock / kStep; ++n) {
      if (n * kStep >= keys) break;
      const int4 r = *reinterpret_cast<const int4*>(rows + first + n * kStep);
      const int row[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        ptx::copy_async_16(base + swizzled((first & 4) + c, piece) + n * kStep * 128,
                           source + static_cast<int64_t>(row[c]) * stride_bytes);
    }
  }
  __device__ void load_box(const Tile& t, const CUtensorMap* map, uint8_t* shared, uint64_t* barrier, int first) {
    if (ptx::thread() == 0) {
      ptx::barrier_arrive_expect(barrier, Shape::kTileBytes);
#pragma unroll
      for (int panel = 0; panel < Shape::kPanels; ++panel)
        ptx::tma_load_4d(ptx::shared_address(shared) + panel * (kTile * 128), map, barrier, panel * 64, first, t.kv,
                         t.b);
    } else {
      ptx::barrier_arrive(barrier);
    }
    for (int n = SharedType::kBandLoaders; n < SharedType::kLoaders; n += SharedType::kBandLoaders)
      ptx::barrier_arrive(barrier);
  }
  // Q and the band: the first kBandLoaders threads. The others call skip().
  __device__ void band(const Tile& t, int done) {
    if (ptx::thread() == 0) {
      ptx::barrier_wait(&s.q_empty, (done & 1) ^ 1);
      ptx::barrier_arrive_expect(&s.q_full,
                                 SharedType::kNumQueries * p.positions_per_tile * p.group * Shape::kRowBytes);
#pragma unroll
      for (int n = 0; n < SharedType::kNumQueries; ++n) {
#pragma unroll
        for (int panel = 0; panel < Shape::kPanels; ++panel)
          ptx::tma_load_4d(ptx::shared_address(s.q[n]) + panel * (kTile * 128), q_maps[n], &s.q_full, panel * 64,
                           t.kv * p.group, t.first, t.b);
      }
    }
    const int band_blocks = (t.band_rows + kBlock - 1) / kBlock;
#pragma unroll 1
    for (int n = 0; n < band_blocks; ++n) {
      const int first = t.band_begin + n * kBlock;
      const uint32_t k_stage = stage<SharedType::kStagesK>(), v_stage = stage<SharedType::kStagesV>();
      ptx::barrier_wait(&s.k_empty[k_stage], empty_parity<SharedType::kStagesK>());
      load_box(t, &p.k_map, s.k[k_stage], &s.k_full[k_stage], first);
      ptx::barrier_wait(&s.v_empty[v_stage], empty_parity<SharedType::kStagesV>());
      load_box(t, &p.v_map, s.v[v_stage], &s.v_full[v_stage], first);
      ++blocks;
    }
  }
  __device__ void skip(const Tile& t) { blocks += (t.band_rows + kBlock - 1) / kBlock; }
  // The union: all threads.
  __device__ void far(const Tile& t, int done) {
    const Bits16* v = p.v + t.b * p.v_batch + t.kv * p.v_head;
    const Bits16* k = kFar ? p.k_far + t.b * p.kf_batch + t.kv * p.kf_head : p.k + t.b * p.k_batch + t.kv * p.k_head;
    const int buffer = done & 1;
    ptx::barrier_wait(&s.union_full[buffer], (done >> 1) & 1);
    const int num_far = s.num_far[buffer];
#pragma unroll 1
    for (int first = 0; first < num_far; first += kBlock) {
      const int32_t* rows = &s.row[buffer][first];
      const int keys = first > 0 && num_far - first <= kTail ? kTail : kBlock;  // has_tail
      const uint32_t k_stage = stage<SharedType::kStagesK>(), v_stage = stage<SharedType::kStagesV>();
      ptx::barrier_wait(&s.k_empty[k_stage], empty_parity<SharedType::kStagesK>());
      gather(k, static_cast<int>(kFar ? p.kf_seq : p.k_seq) * 2, s.k[k_stage], rows, keys);
      ptx::copy_async_arrive(&s.k_full[k_stage]);
      ptx::barrier_wait(&s.v_empty[v_stage], empty_parity<SharedType::kStagesV>());
      gather(v, static_cast<int>(p.v_seq) * 2, s.v[v_stage], rows, keys);
      ptx::copy_async_arrive(&s.v_full[v_stage]);
      ++blocks;
    }
  }
  __device__ void run(int total_tiles) {
    for (int done = 0, index; (index = tile_of_round(done)) < total_tiles; ++done) {
      const Tile t(p, index);
      band(t, done);
      far(t, done);
    }
  }
};

}  // namespace sparsek::cuda::sm90
