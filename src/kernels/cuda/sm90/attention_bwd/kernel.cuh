// dK and dV of the attention backward, sm_90a: math section 5.
//
// Key-major. A work item is 128 key rows and a range of steps (64 query rows each). Band items own 128 consecutive rows
// and run over the queries whose window reaches them; far items own 128 rows of a chunk's list of far rows and run over
// that chunk's queries. K and V of an item stay in shared memory, dK and dV in registers until its end: far keys are
// reduced once a chunk, not once a query tile.
//
// Warpgroup 0: warps 0 and 1 load the steps (Q with row data, dO) by TMA, warps 2 and 3 the items' K and V (TMA, or
// cp.async gathers). Warpgroups 1-2: 64 keys each. S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q from
// registers.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/sm90/attention_fwd/tiles.cuh"

namespace sparsek::cuda::sm90 {

constexpr int kStep = 64;
constexpr int kBwdStages = 3;

struct __align__(16) RowData {  // of the rows of one step
  float lse2[kStep];            // softmax_lse in powers of two; +inf past the end
  float delta[kStep];           // <do, out> - dlse
  float tau[kStep];
  int32_t window_begin[kStep];
};
// What an item's keys are. Plain: far, seen by every query of the chunk at weight 1. Fractional: the same at weights
// inside (0, 1). General: anything.
enum Mode : int32_t { kBand, kFarPlain, kFarFractional, kFarGeneral };
struct __align__(32) Item {
  int32_t head, far, first,
      count;  // count 0: nothing to do. first: band: key row; far: index in the head's list of the chunk
  int32_t step_begin, step_end, max_begin, min_end;  // queries [max_begin, min_end) see every row
};

struct BwdParams {
  CUtensorMap q_map, do_map, q_far_map;  // [batch, positions, heads, head_dim], boxes of positions_per_step x group x
                                         // 64; q_far_map: q_map without far rotary
  CUtensorMap k_map, v_map;  // boxes of 128 rows x 64
  const Bits16 *k_far, *v;
  const RowData* rows;            // [batch * num_kv_heads, steps]
  const Item* items;              // the far ones, then one per 128 key rows and head
  int32_t *next_item, *far_done;  // zeroed; far_done: CTAs that finished their far items
  const int32_t *far_begin, *far_end;
  const LiveRow* live;
  float *dk_scratch, *dv_scratch;  // float32 sums of the far items [head, row, head_dim] permuted; zeroed where a row
                                   // is ever selected
  Bits16 *dk, *dk_far, *dv;                                   // dk_far: null without far rotary
  float* h_key;                                               // [head, seqlen_k], zeroed; null: no score gradient
  int64_t kf_batch, kf_seq, kf_head, v_batch, v_seq, v_head;  // of inputs
  int64_t dk_batch, dk_seq, dk_head;                          // of dk, dk_far and dv
  int32_t num_items, seqlen_q, seqlen_k, num_carried, num_kv_heads, group, group_inverse, positions_per_step,
      steps;  // group_inverse: 65536 / group, rounded up
  float scale, scale_log2;
  bool soft;  // which kernel; not read by it
};

template <class ShapeType>
struct __align__(1024) BwdShared {
  static constexpr int kTileBytes = ShapeType::kTileBytes, kStepBytes = kTileBytes / 2;
  uint8_t k[2][kTileBytes];
  uint8_t v[kTileBytes];
  uint8_t q[kBwdStages][kStepBytes];
  uint8_t d_out[kBwdStages][kStepBytes];
  RowData data[kBwdStages];
  int4 key[2][kBlock];  // row, begin, end, u
  Item item[2];
  uint64_t item_full[2], item_empty[2], k_full[2], k_empty[2], v_full, v_empty, q_full[kBwdStages], do_full[kBwdStages],
      q_empty[kBwdStages], do_empty[kBwdStages];
};

// The nth item of this CTA is in place n & 1; count 0: no more. Who waited for it arrives on item_empty when it is done
// with it.
template <class SharedType>
__device__ __forceinline__ const Item& wait_item(SharedType& s, uint32_t n) {
  ptx::barrier_wait(&s.item_full[n & 1], n >> 1 & 1);
  return s.item[n & 1];
}

// One thread each: Q with the row data, and dO.
template <class ShapeType, bool kQueries>
__device__ void bwd_load_steps(const BwdParams& p, BwdShared<ShapeType>& s) {
  Ring<kBwdStages> at;
  for (uint32_t n = 0;; ++n) {
    const Item& item = wait_item(s, n);
    if (item.count == 0) return;
    const int b = item.head / p.num_kv_heads, head = item.head % p.num_kv_heads * p.group;
    const CUtensorMap* map = !kQueries ? &p.do_map : item.far ? &p.q_far_map : &p.q_map;
    const RowData* data = p.rows + static_cast<int64_t>(item.head) * p.steps + item.step_begin;
    int left = item.step_end - item.step_begin, position = item.step_begin * p.positions_per_step;
    ptx::barrier_arrive(&s.item_empty[n & 1]);
#pragma unroll 1
    for (; left > 0; --left, ++data, position += p.positions_per_step, at.next()) {
      ptx::barrier_wait(kQueries ? &s.q_empty[at.stage] : &s.do_empty[at.stage], at.parity ^ 1);
      uint64_t* full = kQueries ? &s.q_full[at.stage] : &s.do_full[at.stage];
      ptx::barrier_arrive_expect(
          full, p.positions_per_step * p.group * ShapeType::kRowBytes + (kQueries ? sizeof(RowData) : 0));
      const uint32_t to = ptx::shared_address(kQueries ? s.q[at.stage] : s.d_out[at.stage]);
#pragma unroll
      for (int panel = 0; panel < ShapeType::kPanels; ++panel)
        ptx::tma_load_4d(to + panel * (kStep * 128), map, full, panel * 64, head, position, b);
      if (kQueries) ptx::bulk_load(ptx::shared_address(&s.data[at.stage]), data, sizeof(RowData), full);
    }
  }
}

// A warp each: items, their lists and K, and their V. The next item's K has its own buffer, V waits for the last
// product with the one before.
template <class ShapeType, bool kValues>
__device__ void bwd_load_keys(const BwdParams& p, BwdShared<ShapeType>& s) {
  constexpr int kPieces = ShapeType::kPieces;
  for (uint32_t n = 0;; ++n) {
    const int stage = n & 1;
    const uint32_t parity = n >> 1 & 1;
    if (!kValues && ptx::lane() == 0) {
      ptx::barrier_wait(&s.item_empty[stage], parity ^ 1);
      int4* to = reinterpret_cast<int4*>(&s.item[stage]);
      int index;
      do {
        index = atomicAdd(p.next_item, 1);
        to[0] = index < p.num_items ? __ldg(reinterpret_cast<const int4*>(p.items + index)) : int4{0, 0, 0, 0};
      } while (to[0].w == 0 && index < p.num_items);
      if (index < p.num_items) to[1] = __ldg(reinterpret_cast<const int4*>(p.items + index) + 1);
      ptx::barrier_arrive(&s.item_full[stage]);
    }
    const Item& item = wait_item(s, n);
    if (item.count == 0) return;
    const int b = item.head / p.num_kv_heads, kv = item.head % p.num_kv_heads;
    const bool far = item.far;
    uint64_t* full = kValues ? &s.v_full : &s.k_full[stage];
    const uint32_t to = ptx::shared_address(kValues ? s.v : s.k[stage]);
    ptx::barrier_wait(kValues ? &s.v_empty : &s.k_empty[stage], (kValues ? n & 1 : parity) ^ 1);
    if (!far) {
      if (ptx::lane() == 0) {
        ptx::barrier_arrive_expect(full, ShapeType::kTileBytes);
#pragma unroll
        for (int panel = 0; panel < ShapeType::kPanels; ++panel)
          ptx::tma_load_4d(to + panel * (kTile * 128), kValues ? &p.v_map : &p.k_map, full, panel * 64, item.first, kv,
                           b);
      } else {
        ptx::barrier_arrive(full);
      }
      if (!kValues) ptx::barrier_arrive(full);
    } else {
      int4* keys = s.key[stage];
      if (kValues) {
        ptx::barrier_wait(&s.k_full[stage], parity);  // the list
      } else {
        const int4* list = reinterpret_cast<const int4*>(p.live) + item.first;
#pragma unroll 1
        for (int m = ptx::lane(); m < kBlock; m += 32) {
          int4 x = __ldg(list + min(m, item.count - 1));
          if (m >= item.count) x.y = INT32_MAX, x.z = 0;
          keys[m] = x;
        }
        ptx::barrier_arrive(full);
        __syncwarp();
      }
      const int lane = ptx::lane(), piece = lane % kPieces;
      const char* source = reinterpret_cast<const char*>(kValues ? p.v + b * p.v_batch + kv * p.v_head
                                                                 : p.k_far + b * p.kf_batch + kv * p.kf_head) +
                           piece * 16;
      const int row_bytes = static_cast<int>(kValues ? p.v_seq : p.kf_seq) * 2;
      constexpr int kStride = 32 / kPieces, kEach = 4;
#pragma unroll 1
      for (int m = lane / kPieces; m < kBlock; m += kEach * kStride) {
        int row[kEach], bytes = row_bytes;
        asm volatile("" : "+r"(bytes));  // or its 64 bits are kept and multiplied
        // All at once: V's copies begin when the item before is almost done, so what a row takes is seen.
#pragma unroll
        for (int n = 0; n < kEach; ++n) row[n] = keys[m + n * kStride].x;
#pragma unroll
        for (int n = 0; n < kEach; ++n)
          ptx::copy_async_16(to + swizzled(m + n * kStride, piece), source + static_cast<int64_t>(row[n]) * bytes);
      }
      ptx::copy_async_arrive(full);
    }
    __syncwarp();
    if (ptx::lane() == 0) ptx::barrier_arrive(&s.item_empty[stage]);
  }
}

template <class ShapeType, bool kSoft>
struct BwdConsumer {
  using Element = typename ShapeType::Element;
  static constexpr int kHeadDim = ShapeType::kHeadDim, kTileBytes = ShapeType::kTileBytes, kStepBytes = kTileBytes / 2;
  const BwdParams& p;
  BwdShared<ShapeType>& s;
  const int warpgroup, thread;
  float dk[kHeadDim / 2], dv[kHeadDim / 2];
  Ring<kBwdStages> at;
  uint32_t items = 0;  // done; the top bit: those left are band items

  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if ((thread & 31) == 0) ptx::barrier_arrive(barrier);
  }
  // One [64 keys, head_dim] x [64 queries, head_dim]^T product of this warpgroup's keys.
  __device__ void issue_product(float (&d)[kStep / 2], uint32_t keys, uint32_t queries) {
    const ptx::Operand a(keys, 16, 1024), b(queries, 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ptx::wgmma_ss<Element, kStep>(d, a.at((step >> 2) * (kTile * 128) + (step & 3) * 32),
                                    b.at((step >> 2) * (kStep * 128) + (step & 3) * 32), step != 0);
    }
    ptx::wgmma_commit();
  }
  // d[64 keys, head_dim] += a[64 keys, 64 queries] b[64 queries, head_dim]
  __device__ void issue_update(float (&d)[kHeadDim / 2], const uint32_t (&a)[16], uint32_t address) {
    const ptx::Operand b(address, kStep * 128, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kStep / 16; ++step) {
      const uint32_t fragment[4] = {a[step * 4], a[step * 4 + 1], a[step * 4 + 2], a[step * 4 + 3]};
      ptx::wgmma_rs<Element, kHeadDim>(d, fragment, b.at(step * 16 * 128));
    }
    ptx::wgmma_commit();
  }
  __device__ int position_of(int step, int column) const {
    return step * p.positions_per_step + (column * p.group_inverse >> 16);
  }

  // Column of scratch: a thread's columns of a row (8 j + 2 t + c) as vectors of 4, those of a quad side by side.
  __device__ void add_far(float* scratch, const float (&d)[kHeadDim / 2], const int (&row)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row[r] < 0) continue;
      float* at = scratch + static_cast<int64_t>(row[r]) * kHeadDim + (thread & 3) * 4;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; j += 2)
        ptx::add_global_v4(at + j * 8, d[4 * j + 2 * r], d[4 * j + 2 * r + 1], d[4 * j + 4 + 2 * r],
                           d[4 * j + 5 + 2 * r]);
    }
  }
  // out = (d + scratch) * scale; without scratch, or for rows never selected, d * scale.
  __device__ void store(Bits16* out, int64_t stride, const float* scratch, const float (&d)[kHeadDim / 2],
                        const int (&row)[2], const bool (&selected)[2], bool own, float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row[r] < 0) continue;
      float4 x[kHeadDim / 16];
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) x[n] = {0, 0, 0, 0};
      if (scratch != nullptr && selected[r]) {
        const float4* from =
            reinterpret_cast<const float4*>(scratch + static_cast<int64_t>(row[r]) * kHeadDim) + (thread & 3);
#pragma unroll
        for (int n = 0; n < kHeadDim / 16; ++n) x[n] = __ldcg(from + n * 4);
      }
      Bits16* to = out + row[r] * stride + (thread & 3) * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        const int e = 8 * n + 2 * r;
        if (own) x[n].x += d[e], x[n].y += d[e + 1], x[n].z += d[e + 4], x[n].w += d[e + 5];
        *reinterpret_cast<uint32_t*>(to + n * 16) = ptx::pack<Element>(x[n].x * scale, x[n].y * scale);
        *reinterpret_cast<uint32_t*>(to + n * 16 + 8) = ptx::pack<Element>(x[n].z * scale, x[n].w * scale);
      }
    }
  }

  template <int kMode>
  __device__ void run_item(const Item& item) {  // in shared memory: registers are scarce
    constexpr bool kIsFar = kMode != kBand, kGated = kSoft && kMode >= kFarFractional,
                   kScored = kMode >= kFarFractional;
    const int warp = thread >> 5, lane = thread & 31;
    const int key0 = warpgroup * 64 + warp * 16 + (lane >> 2);
    const int column0 = (lane & 3) * 2;
    ptx::barrier_wait(&s.k_full[items & 1], items >> 1 & 1);
    if (kIsFar) ptx::fence_proxy_async();
    const uint32_t keys = ptx::shared_address(s.k[items & 1]), values = ptx::shared_address(s.v);
    int row[2], begin[2], end[2];
    float u[2], h_key[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = key0 + 8 * r;
      if (kIsFar) {
        const int4 x = s.key[items & 1][key];
        begin[r] = x.y, end[r] = x.z, u[r] = __int_as_float(x.w);
      } else {  // the interval tells at the end whether there are far sums; a load that waits there costs
        row[r] = item.first + key;
        const bool valid = row[r] < p.seqlen_k;
        const int64_t at_row = static_cast<int64_t>(item.head) * p.seqlen_k + row[r];
        begin[r] = valid ? __ldg(p.far_begin + at_row) : 0;
        end[r] = valid ? __ldg(p.far_end + at_row) : 0;
      }
    }
#pragma unroll
    for (int e = 0; e < kHeadDim / 2; ++e) dk[e] = dv[e] = 0;
    float x[32], y[32];  // S^T then P^T, dP^T
    const bool any = item.step_begin < item.step_end;
    if (any) {
      ptx::barrier_wait(&s.q_full[at.stage], at.parity);
      issue_product(x, keys + warpgroup * 64 * 128, ptx::shared_address(s.q[at.stage]));
      ptx::barrier_wait(&s.v_full, items & 1);  // a phase an item
      if (kIsFar) ptx::fence_proxy_async();
      ptx::barrier_wait(&s.do_full[at.stage], at.parity);
      issue_product(y, values + warpgroup * 64 * 128, ptx::shared_address(s.d_out[at.stage]));
      ptx::wgmma_wait<1>();

#pragma unroll 1
      for (int step = item.step_begin;; ++step) {
        const uint32_t q = ptx::shared_address(s.q[at.stage]), d_out = ptx::shared_address(s.d_out[at.stage]);
        const RowData& data = s.data[at.stage];
        const int first = step * p.positions_per_step, last = first + p.positions_per_step - 1;
        bool masked = false;
        if (kMode == kFarGeneral)
          masked = item.max_begin > first || item.min_end <= last;
        else if (!kIsFar)
          masked = data.window_begin[p.positions_per_step * p.group - 1] > item.first ||
                   p.num_carried + first < item.first + kBlock - 1;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 lse2 = *reinterpret_cast<const float2*>(&data.lse2[j * 8 + column0]);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            x[4 * j + 2 * r] = ptx::exp2_approx(x[4 * j + 2 * r] * p.scale_log2 - lse2.x);
            x[4 * j + 2 * r + 1] = ptx::exp2_approx(x[4 * j + 2 * r + 1] * p.scale_log2 - lse2.y);
          }
        }
        if (masked && (kMode == kBand || kMode == kFarGeneral)) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = j * 8 + column0 + c, i = position_of(step, column);
              const int low = kIsFar ? 0 : data.window_begin[column];
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const bool visible =
                    kIsFar ? i >= begin[r] && i < end[r] : row[r] >= low && row[r] <= p.num_carried + i;
                if (!visible) x[4 * j + 2 * r + c] = 0;
              }
            }
          }
        }
        uint32_t packed[16];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float2 tau{0, 0};
          if (kGated) tau = *reinterpret_cast<const float2*>(&data.tau[j * 8 + column0]);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float a = x[4 * j + 2 * r], b = x[4 * j + 2 * r + 1];
            if (kGated && kMode == kFarFractional)
              a *= u[r] - tau.x, b *= u[r] - tau.y;
            else if (kGated)
              a *= __saturatef(u[r] - tau.x), b *= __saturatef(u[r] - tau.y);
            packed[2 * j + r] = ptx::pack<Element>(a, b);
          }
        }
        issue_update(dv, packed, d_out);
        ptx::wgmma_wait<1>();
        if (step + 1 == item.step_end) release(&s.v_empty);
#pragma unroll
        for (int r = 0; r < 2; ++r) asm volatile("" : "+f"(u[r]));  // weights are cheaper again than kept
        uint32_t ds[16];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 delta = *reinterpret_cast<const float2*>(&data.delta[j * 8 + column0]);
          float2 tau{0, 0};
          if (kScored) tau = *reinterpret_cast<const float2*>(&data.tau[j * 8 + column0]);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float value[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const float probability = x[4 * j + 2 * r + c];
              float gated = y[4 * j + 2 * r + c];
              if (kScored) {
                const float weight = u[r] - (c == 0 ? tau.x : tau.y);
                const float h = kMode == kFarFractional || (weight > 0 && weight < 1) ? probability * gated : 0.0f;
                h_key[r] += h;
                if (kSoft) gated *= kMode == kFarFractional ? weight : __saturatef(weight);
              }
              value[c] = probability * (gated - (c == 0 ? delta.x : delta.y));
            }
            ds[2 * j + r] = ptx::pack<Element>(value[0], value[1]);
          }
        }
        const int stage = at.stage;
        at.next();
        if (step + 1 == item.step_end) {
          issue_update(dk, ds, q);
          ptx::wgmma_wait<0>();
          release(&s.do_empty[stage]);
          release(&s.q_empty[stage]);
          break;
        }
        issue_update(dk, ds, q);
        ptx::barrier_wait(&s.q_full[at.stage], at.parity);
        issue_product(x, keys + warpgroup * 64 * 128, ptx::shared_address(s.q[at.stage]));
        ptx::barrier_wait(&s.do_full[at.stage], at.parity);
        ptx::wgmma_wait<0>();
        release(&s.do_empty[stage]);
        release(&s.q_empty[stage]);
        issue_product(y, values + warpgroup * 64 * 128, ptx::shared_address(s.d_out[at.stage]));
      }
    } else {
      ptx::barrier_wait(&s.v_full, items & 1);  // a phase an item
      release(&s.v_empty);
    }
    if (kIsFar) {
#pragma unroll
      for (int r = 0; r < 2; ++r) row[r] = s.key[items & 1][key0 + 8 * r].x;
    }
    release(&s.k_empty[items & 1]);
    const int64_t rows = static_cast<int64_t>(item.head) * p.seqlen_k;
    if (kIsFar) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (key0 + 8 * r >= item.count) row[r] = -1;
        if (kScored && p.h_key != nullptr) {
          h_key[r] += __shfl_xor_sync(0xffffffffu, h_key[r], 1);
          h_key[r] += __shfl_xor_sync(0xffffffffu, h_key[r], 2);
          if ((lane & 3) == 0 && row[r] >= 0) ptx::add_global(p.h_key + rows + row[r], h_key[r]);
        }
      }
      add_far(p.dk_scratch + rows * kHeadDim, dk, row);
      add_far(p.dv_scratch + rows * kHeadDim, dv, row);
    } else {
      bool selected[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        selected[r] = end[r] > begin[r];
        if (row[r] >= p.seqlen_k) row[r] = -1;
      }
      wait_far();
      const int b = item.head / p.num_kv_heads, kv = item.head % p.num_kv_heads;
      const float *dk_far = p.dk_scratch + rows * kHeadDim, *dv_far = p.dv_scratch + rows * kHeadDim;
      const int64_t out = b * p.dk_batch + kv * p.dk_head;
      store(p.dv + out, p.dk_seq, dv_far, dv, row, selected, true, 1.0f);
      store(p.dk + out, p.dk_seq, p.dk_far != nullptr ? nullptr : dk_far, dk, row, selected, true, p.scale);
      if (p.dk_far != nullptr) store(p.dk_far + out, p.dk_seq, dk_far, dk, row, selected, false, p.scale);
    }
  }
  // Until every CTA has added its far items. All CTAs are resident and take far items first, so this ends.
  __device__ void wait_far() {
    if ((thread & 31) == 0) {
      while (ptx::load_acquire(p.far_done) < static_cast<int>(gridDim.x)) __nanosleep(100);
    }
    __syncwarp();
  }
  __device__ void run() {
#pragma unroll 1
    for (;; ++items) {
      const Item& item = wait_item(s, items);
      if (items >> 31 == 0 && !(item.count > 0 && item.far)) {
        items |= 1u << 31;
        __threadfence();
        asm volatile("bar.sync 1, 256;" ::: "memory");
        if (warpgroup == 0 && thread == 0) atomicAdd(p.far_done, 1);
      }
      if (item.count == 0) return;
      if (!item.far)
        run_item<kBand>(item);
      else if (item.far == kFarPlain)
        run_item<kFarPlain>(item);
      else if (item.far == kFarFractional)
        run_item<kFarFractional>(item);
      else
        run_item<kFarGeneral>(item);
      release(&s.item_empty[items & 1]);
    }
  }
};

template <class ShapeType, bool kSoft>
__global__ void __launch_bounds__(384, 1) attention_bwd_kernel(const __grid_constant__ BwdParams p) {
  extern __shared__ uint8_t raw[];
  using SharedType = BwdShared<ShapeType>;
  SharedType& s = *reinterpret_cast<SharedType*>(raw);
  if (threadIdx.x == 0) {
    for (auto& barrier : s.item_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.item_empty) ptx::barrier_init(&barrier, 2 + 2 + 8);
    for (auto& barrier : s.k_full) ptx::barrier_init(&barrier, 64);
    for (auto& barrier : s.k_empty) ptx::barrier_init(&barrier, 8);
    ptx::barrier_init(&s.v_full, 32);
    ptx::barrier_init(&s.v_empty, 8);
    for (auto& barrier : s.q_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.do_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.q_empty) ptx::barrier_init(&barrier, 8);
    for (auto& barrier : s.do_empty) ptx::barrier_init(&barrier, 8);
    ptx::fence_barrier_init();
  }
  // Rows that no step fills must hold numbers.
  for (int n = threadIdx.x; n < kBwdStages * SharedType::kStepBytes / 16; n += blockDim.x) {
    reinterpret_cast<int4*>(s.q)[n] = reinterpret_cast<int4*>(s.d_out)[n] = int4{0, 0, 0, 0};
  }
  ptx::fence_proxy_async();
  __syncthreads();
  // The dq kernel, which may start now, reads only what was there before this one.
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_decrease<24>();
    if (threadIdx.x == 0)
      bwd_load_steps<ShapeType, true>(p, s);
    else if (threadIdx.x == 32)
      bwd_load_steps<ShapeType, false>(p, s);
    else if (threadIdx.x >= 96)
      bwd_load_keys<ShapeType, true>(p, s);
    else if (threadIdx.x >= 64)
      bwd_load_keys<ShapeType, false>(p, s);
  } else {
    ptx::registers_increase<240>();
    BwdConsumer<ShapeType, kSoft>{p, s, warpgroup - 1, static_cast<int>(threadIdx.x % 128)}.run();
  }
}

}  // namespace sparsek::cuda::sm90
