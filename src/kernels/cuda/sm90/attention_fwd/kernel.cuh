// Attention forward, sm_90a, head_dim 128, bf16: eq. 7-9.
//
// One CTA = 128 rows (positions x the group's heads) of one KV head. Warpgroup 0 produces: gathers 128-key blocks of K
// and V with cp.async, the window band first, then the union of far rows visible to any query of the tile. Warpgroups 1
// and 2 consume: 64 rows each, S = Q K^T and O += P V by wgmma, the next block's S in flight while the current P V
// runs.
#pragma once
#include <cuda.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/cuda/ptx/instructions.cuh"

namespace sparsek::cuda::sm90 {

using bf16 = __nv_bfloat16;

struct FwdParams {
  CUtensorMap k_map, v_map;      // [batch, heads, rows, 128], boxes of 128 rows x 64
  CUtensorMap q_map, q_far_map;  // [batch, positions, heads, 128], boxes of positions_per_tile x group x 64
  const bf16 *q, *k, *v, *q_far, *k_far;
  const float *scores, *tau;
  const int32_t *window_begin, *far_begin, *far_end;
  bf16* out;
  float* lse;
  const LiveRow* live;        // [batch * num_kv_heads, num_chunks, live_capacity]
  const int32_t* live_count;  // [batch * num_kv_heads, num_chunks]
  int64_t q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, o_batch, o_seq, o_head;
  int64_t qf_batch, qf_seq, qf_head, kf_batch, kf_seq, kf_head;
  int32_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, group, positions_per_tile;
  int32_t num_chunks, chunk, live_capacity;  // chunk: a multiple of positions_per_tile
  float scale_log2;
};

constexpr int kChunk = 1024;  // queries that share a list of far rows, at most
constexpr int kTile = 128;    // rows
constexpr int kBlock = 128;   // keys
constexpr int kHeadDim = 128;
constexpr int kTileBytes = kTile * kHeadDim * 2;
constexpr float kMaxGrowth = 8.0f;  // the running maximum may lag by this many powers of two

// What loader, builder and consumers share. kQueries tiles of query rows, kStagesK_ stages of K, two of V.
template <int kQueries, int kMaxUnion_, int kStagesK_ = 2, int kBandLoaders_ = 128, bool kValuesFirst_ = false>
struct __align__(1024) LoaderShared {
  static constexpr int kStagesK = kStagesK_, kStagesV = 2, kMaxUnion = kMaxUnion_, kNumQueries = kQueries,
                       kLoaders = 128, kBandLoaders = kBandLoaders_;
  static constexpr bool kValuesFirst = kValuesFirst_;
  uint8_t q[kQueries][kTileBytes];
  uint8_t k[kStagesK][kTileBytes];
  uint8_t v[kStagesV][kTileBytes];
  // Union of the far rows of a tile, padded to whole blocks; two of them, the next tile's is built meanwhile.
  int32_t row[2][kMaxUnion];
  float u[2][kMaxUnion];
  uint16_t interval[2][kMaxUnion];  // visible at the tile's queries [low byte, low byte + high byte)
  int32_t warp_count[2][3];
  int32_t num_plain[2], num_full[2], num_far[2];
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
template <bool kFar>
struct Shared : LoaderShared<kFar ? 2 : 1, kFar ? 1664 : 2304> {};

// Byte offset of 16-byte chunk `chunk` (0-15) of row `row` in a [128, 128] bf16 tile of two 64-wide halves, 128-byte
// swizzled.
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
  const int warp, lane;  // warp 0 or 1
  __device__ void sync() { asm volatile("bar.sync 1, 64;" ::: "memory"); }

  __device__ void build(const Tile& t, int buffer) {
    const int64_t list = (static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv) * p.num_chunks + t.first / p.chunk;
    const int candidates = p.live_count[list];
    const int4* live_rows = reinterpret_cast<const int4*>(p.live + list * p.live_capacity);
    const float tau_last = kSoft ? p.tau[(static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv) * p.seqlen_q + t.last] : 0;
    const int half = (candidates + 63) / 64 * 32;
    const int from = warp * half, to = min(candidates, from + half);
    int at[3] = {0, 0, 0};
    const uint32_t before = (1u << lane) - 1;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 4
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
          s.row[buffer][where] = x.x;
          const int begin = max(0, x.y - t.first);
          s.interval[buffer][where] = static_cast<uint16_t>(begin | (min(255, x.z - t.first) - begin) << 8);
          if (kSoft) s.u[buffer][where] = __int_as_float(x.w);
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
          if (warp == 0 && lane == 0) (kind == 0 ? s.num_plain : kind == 1 ? s.num_full : s.num_far)[buffer] = total;
        }
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
    int done = 0;
    for (int index = blockIdx.x; index < total_tiles; index += gridDim.x, ++done) one(index, done);
  }
  __device__ void one(int index, int done) {
    ptx::barrier_wait(&s.union_empty[done & 1], ((done >> 1) & 1) ^ 1);
    build(Tile(p, index), done & 1);
    ptx::barrier_arrive(&s.union_full[done & 1]);
  }
};

// The first warpgroup fills the stages.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 216;
template <typename SharedType>
struct Loader {
  const FwdParams& p;
  SharedType& s;
  const CUtensorMap *q_map, *second_map;  // second_map: what goes to s.q[1], if there is one
  const bf16* far_keys;
  int k_stride;  // bytes
  int64_t k_batch, k_head;
  const int thread;
  Ring<SharedType::kStagesK> k_at{};
  Ring<SharedType::kStagesV> v_at{};

  __device__ void load_q(const Tile& t, const CUtensorMap* map, uint8_t* shared) {
    const uint32_t base = ptx::shared_address(shared);
    ptx::tma_load_4d(base, map, &s.q_full, 0, t.kv * p.group, t.first, t.b);
    ptx::tma_load_4d(base + kTileBytes / 2, map, &s.q_full, 64, t.kv * p.group, t.first, t.b);
  }
  // A half-warp copies rows 4m .. 4m+3, a thread 16 bytes of each; m & 1 is the thread's, so its swizzles are fixed.
  __device__ void gather(const bf16* x, int stride_bytes, uint8_t* shared, const int32_t* rows) {
    constexpr int kRows = kBlock * 32 / SharedType::kLoaders;  // of a warp
    const int chunk = thread & 15, half = (thread >> 4) & 1, first = (thread >> 5) * kRows + half * 4;
    const char* source = reinterpret_cast<const char*>(x) + chunk * 16;
    const uint32_t base = ptx::shared_address(shared) + (thread >> 5) * kRows * 128;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const int4 r = *reinterpret_cast<const int4*>(rows + first + n * 8);
      const int row[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        ptx::copy_async_16(base + swizzled(half * 4 + c, chunk) + n * 1024,
                           source + static_cast<int64_t>(row[c]) * stride_bytes);
    }
  }
  __device__ void load_box(const Tile& t, const CUtensorMap* map, uint8_t* shared, uint64_t* barrier, int first) {
    if (thread == 0) {
      ptx::barrier_arrive_expect(barrier, kTileBytes);
      const uint32_t base = ptx::shared_address(shared);
      ptx::tma_load_4d(base, map, barrier, 0, first, t.kv, t.b);
      ptx::tma_load_4d(base + kTileBytes / 2, map, barrier, 64, first, t.kv, t.b);
    } else {
      ptx::barrier_arrive(barrier);
    }
    for (int n = SharedType::kBandLoaders; n < SharedType::kLoaders; n += SharedType::kBandLoaders)
      ptx::barrier_arrive(barrier);
  }
  // Q and the band: the first kBandLoaders threads. The others call skip().
  __device__ void band(const Tile& t, int done) {
    if (thread == 0) {
      ptx::barrier_wait(&s.q_empty, (done & 1) ^ 1);
      ptx::barrier_arrive_expect(&s.q_full, SharedType::kNumQueries * p.positions_per_tile * p.group * kHeadDim * 2);
      load_q(t, q_map, s.q[0]);
      if (SharedType::kNumQueries == 2) load_q(t, second_map, s.q[SharedType::kNumQueries - 1]);
    }
    const int band_blocks = (t.band_rows + kBlock - 1) / kBlock;
#pragma unroll 1
    for (int n = 0; n < band_blocks; ++n) {
      const int first = t.band_begin + n * kBlock;
      if (SharedType::kValuesFirst) band_values(t, first);
      ptx::barrier_wait(&s.k_empty[k_at.stage], k_at.parity ^ 1);
      load_box(t, &p.k_map, s.k[k_at.stage], &s.k_full[k_at.stage], first);
      k_at.next();
      if (!SharedType::kValuesFirst) band_values(t, first);
    }
  }
  __device__ void band_values(const Tile& t, int first) {
    ptx::barrier_wait(&s.v_empty[v_at.stage], v_at.parity ^ 1);
    load_box(t, &p.v_map, s.v[v_at.stage], &s.v_full[v_at.stage], first);
    v_at.next();
  }
  __device__ void skip(const Tile& t) {
    for (int n = (t.band_rows + kBlock - 1) / kBlock; n > 0; --n) k_at.next(), v_at.next();
  }
  // The union: all threads.
  __device__ void far(const Tile& t, int done) {
    const bf16* v = p.v + t.b * p.v_batch + t.kv * p.v_head;
    const bf16* k = far_keys + t.b * k_batch + t.kv * k_head;
    const int v_stride = static_cast<int>(p.v_seq) * 2;
    const int buffer = done & 1;
    ptx::barrier_wait(&s.union_full[buffer], (done >> 1) & 1);
    const int num_far = s.num_far[buffer];
#pragma unroll 1
    for (int first = 0; first < num_far; first += kBlock) {
      const int32_t* rows = &s.row[buffer][first];
      const auto values = [&] {
        ptx::barrier_wait(&s.v_empty[v_at.stage], v_at.parity ^ 1);
        gather(v, v_stride, s.v[v_at.stage], rows);
        ptx::copy_async_arrive(&s.v_full[v_at.stage]);
        v_at.next();
      };
      if (SharedType::kValuesFirst) values();
      ptx::barrier_wait(&s.k_empty[k_at.stage], k_at.parity ^ 1);
      gather(k, k_stride, s.k[k_at.stage], rows);
      ptx::copy_async_arrive(&s.k_full[k_at.stage]);
      k_at.next();
      if (!SharedType::kValuesFirst) values();
    }
  }
  __device__ void run(int total_tiles) {
    int done = 0;
    for (int index = blockIdx.x; index < total_tiles; index += gridDim.x, ++done) {
      const Tile t(p, index);
      band(t, done);
      far(t, done);
    }
  }
};

template <bool kSoft, bool kFar>
struct Consumer {
  const FwdParams& p;
  Shared<kFar>& s;
  const int warpgroup, thread;  // warpgroup 0 or 1; thread 0-127
  int position[2];
  int window_low[2], window_high[2];
  float tau[2], reference[2], row_sum[2];  // reference: the maximum used, in powers of two
  float acc[64];
  Ring<Shared<kFar>::kStagesK> k_at;
  Ring<Shared<kFar>::kStagesV> v_at;

  __device__ void issue_scores(float (&scores)[64], const uint8_t* q, const uint8_t* k) {
    const ptx::Operand a(ptx::shared_address(q) + warpgroup * 64 * 128, 16, 1024), b(ptx::shared_address(k), 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t offset = (step >> 2) * (kTile * 128) + (step & 3) * 32;
      ptx::wgmma_m64n128k16_ss(scores, a.at(offset), b.at(offset), step != 0);
    }
    ptx::wgmma_commit();
  }
  __device__ void issue_values(const uint32_t (&probabilities)[32], const uint8_t* v) {
    const ptx::Operand b(ptx::shared_address(v), kTile * 128, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlock / 16; ++step) {
      const uint32_t a[4] = {probabilities[step * 4], probabilities[step * 4 + 1], probabilities[step * 4 + 2],
                             probabilities[step * 4 + 3]};
      ptx::wgmma_m64n128k16_rs(acc, a, b.at(step * 16 * 128));
    }
    ptx::wgmma_commit();
  }
  // Band block whose first row is `first`.
  __device__ void mask_window(float (&scores)[64], int first) {
    const int column0 = (thread & 3) * 2;
#pragma unroll
    for (int e = 0; e < 64; ++e) {
      const int r = (e >> 1) & 1, row = first + (e >> 2) * 8 + column0 + (e & 1);
      if (row < window_low[r] || row > window_high[r]) scores[e] = -INFINITY;
    }
  }
  // Union block whose intervals start at `interval`.
  __device__ void mask_union(float (&scores)[64], const uint16_t* interval, int tile_first) {
    const int column0 = (thread & 3) * 2;
    const int query[2] = {position[0] - tile_first, position[1] - tile_first};
#pragma unroll
    for (int e = 0; e < 64; e += 4) {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(&interval[(e >> 2) * 8 + column0]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint32_t begin = (both >> (16 * c)) & 255, length = (both >> (16 * c + 8)) & 255;
        if (query[0] - begin >= length) scores[e + c] = -INFINITY;
        if (query[1] - begin >= length) scores[e + 2 + c] = -INFINITY;
      }
    }
  }
  // Exponentials of one block and their running sum. The reference maximum moves only when it grew much; true if it did
  // for some row of the warp: then the accumulated output must be multiplied by `factor`.
  __device__ bool softmax(float (&scores)[64], float (&factor)[2]) {
    float block_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = fmaxf(scores[2 * r], scores[2 * r + 1]), b = fmaxf(scores[2 * r + 4], scores[2 * r + 5]);
#pragma unroll
      for (int e = 8; e < 64; e += 8) {
        a = fmaxf(a, fmaxf(scores[e + 2 * r], scores[e + 2 * r + 1]));
        b = fmaxf(b, fmaxf(scores[e + 4 + 2 * r], scores[e + 5 + 2 * r]));
      }
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
      block_max[r] = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2)) * p.scale_log2;
    }
    const bool moved =
        __any_sync(0xffffffffu, block_max[0] > reference[0] + kMaxGrowth || block_max[1] > reference[1] + kMaxGrowth);
    if (moved) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float next = fmaxf(reference[r], block_max[r]);
        factor[r] = next == -INFINITY ? 1.0f : ptx::exp2_approx(reference[r] - next);
        row_sum[r] *= factor[r];
        reference[r] = next;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float subtract = reference[r] == -INFINITY ? 0.0f : reference[r];
      float sum[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < 64; e += 4) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[e + 2 * r + c];
          x = ptx::exp2_approx(x * p.scale_log2 - subtract);
          sum[c] += x;
        }
      }
      row_sum[r] += sum[0] + sum[1];
    }
    return moved;
  }
  __device__ void weigh(float (&scores)[64], const float* u_block) {
    const int column0 = (thread & 3) * 2;
#pragma unroll
    for (int e = 0; e < 64; e += 4) {
      const float2 u = *reinterpret_cast<const float2*>(&u_block[(e >> 2) * 8 + column0]);
      scores[e] *= __saturatef(u.x - tau[0]);
      scores[e + 1] *= __saturatef(u.y - tau[0]);
      scores[e + 2] *= __saturatef(u.x - tau[1]);
      scores[e + 3] *= __saturatef(u.y - tau[1]);
    }
  }
  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if ((thread & 31) == 0) ptx::barrier_arrive(barrier);
  }

  __device__ void run_tile(const Tile& t, int done) {
    const int64_t head = static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv;
    const int tile_row = warpgroup * 64 + (thread >> 5) * 16 + ((thread & 31) >> 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row + 8 * r, i = t.first + row / p.group;
      const bool valid = row < p.positions_per_tile * p.group && i < p.seqlen_q;
      position[r] = valid ? i : -1;  // sees nothing
      window_low[r] = valid ? p.window_begin[static_cast<int64_t>(t.b) * p.seqlen_q + i] : INT32_MAX;
      window_high[r] = valid ? p.num_carried + i : -1;
      tau[r] = kSoft && valid ? p.tau[head * p.seqlen_q + i] : 0;
      reference[r] = -INFINITY;
      row_sum[r] = 0;
    }
#pragma unroll
    for (int e = 0; e < 64; ++e) acc[e] = 0;
    const int band_blocks = (t.band_rows + kBlock - 1) / kBlock;
    const int inner_low = p.window_begin[static_cast<int64_t>(t.b) * p.seqlen_q + t.last],
              inner_high = p.num_carried + t.first;
    const bool full_tile = p.positions_per_tile * p.group == kTile && t.first + p.positions_per_tile <= p.seqlen_q;

    const int buffer = done & 1;
    int num_plain = 0, num_full = 0, blocks = band_blocks;
    float scores[64];
    uint32_t probabilities[32];
    float factor[2];
    const auto prepare = [&](int n) {  // mask, softmax, weights of block n, whose products are in `scores`
      bool moved;
      if (n < band_blocks) {
        const int first = t.band_begin + n * kBlock;
        if (!full_tile || first < inner_low || first + kBlock - 1 > inner_high) mask_window(scores, first);
        moved = softmax(scores, factor);
      } else {
        const int first = (n - band_blocks) * kBlock;
        if (first + kBlock > num_full || !full_tile) mask_union(scores, &s.interval[buffer][first], t.first);
        moved = softmax(scores, factor);
        if (kSoft && first + kBlock > num_plain) weigh(scores, &s.u[buffer][first]);
      }
      return moved;
    };
    const auto to_bf16 = [&] {
#pragma unroll
      for (int e = 0; e < 64; e += 2) probabilities[e >> 1] = ptx::pack_bf16(scores[e], scores[e + 1]);
    };
    ptx::barrier_wait(&s.q_full, done & 1);
    ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
    issue_scores(scores, s.q[0], s.k[k_at.stage]);
    ptx::wgmma_wait<0>();
    release(&s.k_empty[k_at.stage]);
    k_at.next();
    prepare(0);
    to_bf16();
    const auto learn_union = [&] {
      ptx::barrier_wait(&s.union_full[buffer], (done >> 1) & 1);
      num_plain = s.num_plain[buffer];
      num_full = s.num_full[buffer];
      blocks = band_blocks + (s.num_far[buffer] + kBlock - 1) / kBlock;
    };
    if (band_blocks == 1) learn_union();
#pragma unroll 1
    for (int n = 1; n < blocks; ++n) {
      ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
      ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
      if (n >= band_blocks) ptx::fence_proxy_async();
      asm volatile("bar.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
      issue_scores(scores, s.q[kFar && n >= band_blocks], s.k[k_at.stage]);
      issue_values(probabilities, s.v[v_at.stage]);
      asm volatile("bar.arrive %0, 256;" ::"r"(3 - warpgroup) : "memory");
      ptx::wgmma_wait<1>();
      release(&s.k_empty[k_at.stage]);
      k_at.next();
      const bool moved = prepare(n);
      ptx::wgmma_wait<0>();
      release(&s.v_empty[v_at.stage]);
      v_at.next();
      if (moved) {
#pragma unroll
        for (int e = 0; e < 64; ++e) acc[e] *= factor[(e >> 1) & 1];
      }
      to_bf16();
      if (n == band_blocks - 1) learn_union();
    }
    release(&s.q_empty);
    release(&s.union_empty[buffer]);
    ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
    ptx::fence_proxy_async();
    issue_values(probabilities, s.v[v_at.stage]);
    ptx::wgmma_wait<0>();
    release(&s.v_empty[v_at.stage]);
    v_at.next();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
      const int row = tile_row + 8 * r;
      if (position[r] < 0) continue;
      const int head_q = t.kv * p.group + row % p.group;
      // A score that is not finite makes tau NaN: so is the row.
      const float tau_row = p.tau[head * p.seqlen_q + position[r]], poison = tau_row != tau_row ? tau_row : 0.0f;
      const float inverse = (row_sum[r] > 0 ? 1.0f / row_sum[r] : 0.0f) + poison;
      bf16* out = p.out + t.b * p.o_batch + position[r] * p.o_seq + head_q * p.o_head + (thread & 3) * 2;
#pragma unroll
      for (int e = 0; e < 64; e += 4) {
        *reinterpret_cast<uint32_t*>(out + (e >> 2) * 8) =
            ptx::pack_bf16(acc[e + 2 * r] * inverse, acc[e + 2 * r + 1] * inverse);
      }
      if ((thread & 3) == 0) {
        p.lse[(static_cast<int64_t>(t.b) * p.num_heads + head_q) * p.seqlen_q + position[r]] =
            (row_sum[r] > 0 ? (reference[r] + log2f(row_sum[r])) * 0.69314718055994531f : -INFINITY) + poison;
      }
    }
  }
};

template <bool kSoft, bool kFar>
__global__ void __launch_bounds__(512, 1) attention_fwd_kernel(const __grid_constant__ FwdParams p) {
  extern __shared__ uint8_t raw[];
  Shared<kFar>& s = *reinterpret_cast<Shared<kFar>*>(raw);
  const int total_tiles = (p.seqlen_q + p.positions_per_tile - 1) / p.positions_per_tile * p.batch * p.num_kv_heads;
  if (threadIdx.x == 0) s.initialise();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_decrease<kProducerRegisters>();
    Loader<Shared<kFar>>{p,
                         s,
                         &p.q_map,
                         &p.q_far_map,
                         kFar ? p.k_far : p.k,
                         static_cast<int>(kFar ? p.kf_seq : p.k_seq) * 2,
                         kFar ? p.kf_batch : p.k_batch,
                         kFar ? p.kf_head : p.k_head,
                         static_cast<int>(threadIdx.x)}
        .run(total_tiles);
  } else if (warpgroup == 3) {
    ptx::registers_decrease<kProducerRegisters>();
    if (threadIdx.x < 448)
      Builder<kSoft, Shared<kFar>>{p, s, static_cast<int>(threadIdx.x / 32) - 12, static_cast<int>(threadIdx.x % 32)}
          .run(total_tiles);
  } else {
    ptx::registers_increase<kConsumerRegisters>();
    Consumer<kSoft, kFar> consumer{p, s, warpgroup - 1, static_cast<int>(threadIdx.x % 128)};
    if (warpgroup == 2) asm volatile("bar.arrive 2, 256;" ::: "memory");
    int done = 0;
    for (int index = blockIdx.x; index < total_tiles; index += gridDim.x, ++done)
      consumer.run_tile(Tile(p, index), done);
  }
}

}  // namespace sparsek::cuda::sm90
