// Attention backward, sm_90a, head_dim 128, bf16: math section 5.
//
// Key-major. A work item is 128 key rows and a range of steps (64 query rows each). Band items own 128 consecutive rows
// and run over the queries whose window reaches them; far items own 128 rows of a chunk's list of far rows and run over
// that chunk's queries. K and V of an item stay in shared memory, dK and dV in registers until its end: far keys are
// reduced once a chunk, not once a query tile. dQ is added to a float32 scratch in fragment order.
//
// Warpgroup 0: warp 0 loads the steps (Q, dO, row data) by TMA, warps 2-3 the items' K and V (TMA, or cp.async
// gathers). Warpgroups 1-2: 64 keys each. S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q from registers; dS
// through shared memory for dQ = dS K, of which each warpgroup computes 64 columns.
#pragma once
#include "kernels/cuda/sm90/attention_fwd/kernel.cuh"

namespace sparsek::cuda::sm90 {

constexpr int kStep = 64;
constexpr int kStepBytes = kStep * kHeadDim * 2;
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
  CUtensorMap q_map, do_map, q_far_map;  // [batch, positions, heads, 128], boxes of positions_per_step x group x 64
  CUtensorMap k_map, v_map;              // boxes of 128 rows x 64
  const bf16 *k_far, *v;
  const RowData* rows;            // [batch * num_kv_heads, steps]
  const Item* items;              // the far ones, then one per 128 key rows and head
  int32_t *next_item, *far_done;  // zeroed; far_done: CTAs that finished their far items
  const int32_t *far_begin, *far_end;
  const LiveRow* live;
  float *dq, *dq_far;  // float32 scratch by fragments, zeroed
  float *dk_scratch,
      *dv_scratch;  // float32 sums of the far items [head, row, 128] permuted; zeroed where a row is ever selected
  bf16 *dk, *dk_far, *dv;
  float *h_key, *h_query;  // [head, seqlen_k], [head, seqlen_q], zeroed; null: no score gradient
  int64_t kf_batch, kf_seq, kf_head, v_batch, v_seq, v_head;  // of inputs
  int64_t dk_batch, dk_seq, dk_head, dkf_batch, dkf_seq, dkf_head, dv_batch, dv_seq, dv_head;
  int32_t num_items, seqlen_q, seqlen_k, num_carried, num_kv_heads, group, group_inverse, positions_per_step,
      steps;  // group_inverse: 65536 / group, rounded up
  int32_t num_chunks, live_capacity;
  float scale, scale_log2;
};

struct __align__(1024) BwdShared {
  uint8_t k[2][kTileBytes];
  uint8_t v[kTileBytes];
  uint8_t q[kBwdStages][kStepBytes];
  uint8_t d_out[kBwdStages][kStepBytes];
  uint8_t ds[kBlock * kStep * 2];  // [key][query], swizzled
  RowData data[kBwdStages];
  int4 key[2][kBlock];  // row, begin, end, u
  Item item[2];
  uint64_t item_full[2], item_empty[2], k_full[2], k_empty[2], v_full, v_empty, q_full[kBwdStages], do_full[kBwdStages],
      q_empty[kBwdStages], do_empty[kBwdStages];
};

// The next item of this CTA; count 0: no more. Everyone who calls must then arrive on item_empty of that place.
__device__ __forceinline__ Item wait_item(BwdShared& s, const Ring<2>& at) {
  ptx::barrier_wait(&s.item_full[at.stage], at.parity);
  return s.item[at.stage];
}

// One thread each: Q with the row data, and dO.
template <bool kFar, bool kQueries>
__device__ void bwd_load_steps(const BwdParams& p, BwdShared& s) {
  Ring<kBwdStages> at;
  const uint32_t rows = p.positions_per_step * p.group;
  Ring<2> item_at;
  while (true) {
    const Item item = wait_item(s, item_at);
    ptx::barrier_arrive(&s.item_empty[item_at.stage]);
    item_at.next();
    if (item.count == 0) return;
    const int b = item.head / p.num_kv_heads, head = item.head % p.num_kv_heads * p.group;
    const CUtensorMap* map = !kQueries ? &p.do_map : kFar && item.far ? &p.q_far_map : &p.q_map;
    for (int step = item.step_begin; step < item.step_end; ++step) {
      ptx::barrier_wait(kQueries ? &s.q_empty[at.stage] : &s.do_empty[at.stage], at.parity ^ 1);
      uint64_t* full = kQueries ? &s.q_full[at.stage] : &s.do_full[at.stage];
      ptx::barrier_arrive_expect(full, rows * (kHeadDim * 2) + (kQueries ? sizeof(RowData) : 0));
      const uint32_t to = ptx::shared_address(kQueries ? s.q[at.stage] : s.d_out[at.stage]);
      ptx::tma_load_4d(to, map, full, 0, head, step * p.positions_per_step, b);
      ptx::tma_load_4d(to + kStepBytes / 2, map, full, 64, head, step * p.positions_per_step, b);
      if (kQueries)
        ptx::bulk_load(ptx::shared_address(&s.data[at.stage]),
                       p.rows + static_cast<int64_t>(item.head) * p.steps + step, sizeof(RowData), full);
      at.next();
    }
  }
}

// 64 threads. The next item's K has its own buffer, V waits for the last product with the one before.
__device__ inline void bwd_load_keys(const BwdParams& p, BwdShared& s, int thread) {
  Ring<2> at;
  uint32_t v_parity = 1;
  const int chunk = thread & 15;
  Ring<2> item_at;
  while (true) {
    if (thread == 0) {
      ptx::barrier_wait(&s.item_empty[item_at.stage], item_at.parity ^ 1);
      Item item{0, 0, 0, 0, 0, 0, 0, 0};
      while (item.count == 0) {
        const int index = atomicAdd(p.next_item, 1);
        if (index >= p.num_items) break;
        const int4* from = reinterpret_cast<const int4*>(p.items + index);
        const int4 a = __ldg(from), b = __ldg(from + 1);
        item = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      }
      s.item[item_at.stage] = item;
      ptx::barrier_arrive(&s.item_full[item_at.stage]);
    }
    const Item item = wait_item(s, item_at);
    ptx::barrier_arrive(&s.item_empty[item_at.stage]);
    item_at.next();
    if (item.count == 0) return;
    const int b = item.head / p.num_kv_heads, kv = item.head % p.num_kv_heads;
    const int4* list = reinterpret_cast<const int4*>(p.live) + item.first;
    const auto load = [&](const CUtensorMap* map, uint64_t* full, uint32_t to) {
      if (thread == 0) {
        ptx::barrier_arrive_expect(full, kTileBytes);
        for (int half = 0; half < 2; ++half)
          ptx::tma_load_4d(to + half * (kTileBytes / 2), map, full, half * 64, item.first, kv, b);
      } else {
        ptx::barrier_arrive(full);
      }
    };
    const int4* key = s.key[at.stage];
    const auto gather = [&](const bf16* x, int stride, uint64_t* full, uint32_t to) {
      const char* source = reinterpret_cast<const char*>(x) + chunk * 16;
#pragma unroll 4
      for (int n = thread >> 4; n < kBlock; n += 4)
        ptx::copy_async_16(to + swizzled(n, chunk), source + static_cast<int64_t>(key[n].x) * stride);
      ptx::copy_async_arrive(full);
    };
    uint64_t* full = &s.k_full[at.stage];
    ptx::barrier_wait(&s.k_empty[at.stage], at.parity ^ 1);
    if (!item.far) {
      load(&p.k_map, full, ptx::shared_address(s.k[at.stage]));
      ptx::barrier_arrive(full);
    } else {
      for (int n = thread; n < kBlock; n += 64) {
        int4 x = __ldg(list + min(n, item.count - 1));
        if (n >= item.count) x.y = INT32_MAX, x.z = 0;
        s.key[at.stage][n] = x;
      }
      ptx::barrier_arrive(full);
      asm volatile("bar.sync 8, 64;" ::: "memory");
      gather(p.k_far + b * p.kf_batch + kv * p.kf_head, static_cast<int>(p.kf_seq) * 2, full,
             ptx::shared_address(s.k[at.stage]));
    }
    at.next();
    ptx::barrier_wait(&s.v_empty, v_parity);
    v_parity ^= 1;
    if (!item.far)
      load(&p.v_map, &s.v_full, ptx::shared_address(s.v));
    else
      gather(p.v + b * p.v_batch + kv * p.v_head, static_cast<int>(p.v_seq) * 2, &s.v_full, ptx::shared_address(s.v));
  }
}

template <bool kSoft, bool kFar, bool kDq>
struct BwdConsumer {
  const BwdParams& p;
  BwdShared& s;
  const int warpgroup, thread;
  float dk[64], dv[64];
  Ring<2> k_at;
  uint32_t v_parity = 0;
  Ring<kBwdStages> at;
  bool far_known = false;

  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if ((thread & 31) == 0) ptx::barrier_arrive(barrier);
  }
  // One [64 keys, 128] x [64 queries, 128]^T product of this warpgroup's keys.
  __device__ void issue_product(float (&d)[32], uint32_t keys, uint32_t queries) {
    const ptx::Operand a(keys, 16, 1024), b(queries, 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ptx::wgmma_m64n64k16_ss<0, 0>(d, a.at((step >> 2) * (kTileBytes / 2) + (step & 3) * 32),
                                    b.at((step >> 2) * (kStepBytes / 2) + (step & 3) * 32), step != 0);
    }
    ptx::wgmma_commit();
  }
  // d[64 keys, 128] += a[64 keys, 64 queries] b[64 queries, 128]
  __device__ void issue_update(float (&d)[64], const uint32_t (&a)[16], uint32_t address) {
    const ptx::Operand b(address, kStepBytes / 2, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kStep / 16; ++step) {
      const uint32_t fragment[4] = {a[step * 4], a[step * 4 + 1], a[step * 4 + 2], a[step * 4 + 3]};
      ptx::wgmma_m64n128k16_rs(d, fragment, b.at(step * 16 * 128));
    }
    ptx::wgmma_commit();
  }
  __device__ int position_of(int step, int column) const {
    return step * p.positions_per_step + (column * p.group_inverse >> 16);
  }

  // Column of scratch: a thread's 32 columns of a row (8 j + 2 t + c) as 8 vectors, those of a quad side by side.
  __device__ void add_far(float* scratch, const float (&d)[64], const int (&row)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row[r] < 0) continue;
      float* at = scratch + static_cast<int64_t>(row[r]) * kHeadDim + (thread & 3) * 4;
#pragma unroll
      for (int j = 0; j < 16; j += 2)
        ptx::add_global_v4(at + j * 8, d[4 * j + 2 * r], d[4 * j + 2 * r + 1], d[4 * j + 4 + 2 * r],
                           d[4 * j + 5 + 2 * r]);
    }
  }
  // out = (d + scratch) * scale; without scratch, or for rows never selected, d * scale.
  __device__ void store(bf16* out, int64_t stride, const float* scratch, const float (&d)[64], const int (&row)[2],
                        const bool (&selected)[2], bool own, float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row[r] < 0) continue;
      float4 x[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] = {0, 0, 0, 0};
      if (scratch != nullptr && selected[r]) {
        const float4* from =
            reinterpret_cast<const float4*>(scratch + static_cast<int64_t>(row[r]) * kHeadDim) + (thread & 3);
#pragma unroll
        for (int n = 0; n < 8; ++n) x[n] = __ldcg(from + n * 4);
      }
      bf16* to = out + row[r] * stride + (thread & 3) * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int e = 8 * n + 2 * r;
        if (own) x[n].x += d[e], x[n].y += d[e + 1], x[n].z += d[e + 4], x[n].w += d[e + 5];
        *reinterpret_cast<uint32_t*>(to + n * 16) = ptx::pack_bf16(x[n].x * scale, x[n].y * scale);
        *reinterpret_cast<uint32_t*>(to + n * 16 + 8) = ptx::pack_bf16(x[n].z * scale, x[n].w * scale);
      }
    }
  }

  template <int kMode>
  __device__ void run_item(const Item& item) {
    constexpr bool kIsFar = kMode != kBand, kGated = kSoft && kMode >= kFarFractional,
                   kScored = kMode >= kFarFractional;
    const int warp = thread >> 5, lane = thread & 31;
    const int key0 = warpgroup * 64 + warp * 16 + (lane >> 2);
    const int column0 = (lane & 3) * 2;
    ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
    if (kIsFar) ptx::fence_proxy_async();
    const uint32_t keys = ptx::shared_address(s.k[k_at.stage]), values = ptx::shared_address(s.v);
    int row[2], begin[2], end[2];
    float u[2], h_key[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = key0 + 8 * r;
      if (kIsFar) {
        const int4 x = s.key[k_at.stage][key];
        row[r] = x.x, begin[r] = x.y, end[r] = x.z, u[r] = __int_as_float(x.w);
      } else {
        row[r] = item.first + key;
      }
    }
#pragma unroll
    for (int e = 0; e < 64; ++e) dk[e] = dv[e] = 0;
    float* dq = (kFar && kIsFar ? p.dq_far : p.dq) +
                (static_cast<int64_t>(item.head) * p.steps * 2 + warpgroup) * (kStep * 64) + thread * 4;
    float x[32], y[32];  // S^T then P^T, dP^T
    const bool any = item.step_begin < item.step_end;
    if (any) {
      ptx::barrier_wait(&s.q_full[at.stage], at.parity);
      issue_product(x, keys + warpgroup * 64 * 128, ptx::shared_address(s.q[at.stage]));
      ptx::barrier_wait(&s.v_full, v_parity);
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
            packed[2 * j + r] = ptx::pack_bf16(a, b);
          }
        }
        issue_update(dv, packed, d_out);
        ptx::wgmma_wait<1>();
        if (step + 1 == item.step_end) release(&s.v_empty);
#pragma unroll
        for (int r = 0; r < 2; ++r) asm volatile("" : "+f"(u[r]));  // weights are cheaper again than kept
        uint32_t ds[16];
        float sum[16];  // eq. 10: sums over the fractional pairs
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 delta = *reinterpret_cast<const float2*>(&data.delta[j * 8 + column0]);
          float2 tau{0, 0};
          if (kScored) tau = *reinterpret_cast<const float2*>(&data.tau[j * 8 + column0]);
          sum[2 * j] = sum[2 * j + 1] = 0;
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
                if (kDq) sum[2 * j + c] += h;
                if (kSoft) gated *= kMode == kFarFractional ? weight : __saturatef(weight);
              }
              value[c] = probability * (gated - (c == 0 ? delta.x : delta.y));
            }
            ds[2 * j + r] = ptx::pack_bf16(value[0], value[1]);
          }
        }
        if (kDq && kScored && p.h_key != nullptr) {
          // Reduce over the 8 lanes that hold other keys of the same queries; each ends with 2 of the 16 columns.
#pragma unroll
          for (int half = 8, bit = 16; half >= 2; half /= 2, bit /= 2) {
            const bool upper = lane & bit;
#pragma unroll
            for (int n = 0; n < 8; ++n) {
              if (n < half) {
                const float send = upper ? sum[n] : sum[n + half], keep = upper ? sum[n + half] : sum[n];
                sum[n] = keep + __shfl_xor_sync(0xffffffffu, send, bit);
              }
            }
          }
          const int column = (lane >> 2) * 8 + column0;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int i = position_of(step, column + c);
            if (i < p.seqlen_q && i <= last)
              ptx::add_global(p.h_query + static_cast<int64_t>(item.head) * p.seqlen_q + i, sum[c]);
          }
        }
        if constexpr (!kDq) {
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
        } else {
          // dS to shared memory once the other warpgroup no longer reads the last one.
          asm volatile("bar.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
          {
            const int matrix = lane >> 3, key = warpgroup * 64 + warp * 16 + (matrix & 1) * 8 + (lane & 7);
            const uint32_t base = ptx::shared_address(s.ds) + key * 128;
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
              ptx::store_matrix_x4(base + (((j + (matrix >> 1)) ^ (key & 7)) << 4), ds[2 * j], ds[2 * j + 1],
                                   ds[2 * j + 2], ds[2 * j + 3]);
            }
          }
          ptx::fence_proxy_async();
          asm volatile("bar.arrive %0, 256;" ::"r"(5 - warpgroup) : "memory");
          const int stage = at.stage;
          at.next();
          float d[32];
          const auto issue_ds = [&] {                                           // dQ, then dK
            asm volatile("bar.sync %0, 256;" ::"r"(4 + warpgroup) : "memory");  // both halves of dS are there
            const ptx::Operand all(ptx::shared_address(s.ds), 8192, 1024),
                k_operand(keys + warpgroup * (kTileBytes / 2), 16384, 1024);
            ptx::wgmma_fence();
#pragma unroll
            for (int n = 0; n < kBlock / 16; ++n)
              ptx::wgmma_m64n64k16_ss<1, 1>(d, all.at(n * 16 * 128), k_operand.at(n * 16 * 128), n != 0);
            ptx::wgmma_commit();
            const ptx::Operand own(ptx::shared_address(s.ds) + warpgroup * 64 * 128, 16, 1024),
                q_operand(q, kStepBytes / 2, 1024);
#pragma unroll
            for (int n = 0; n < kStep / 16; ++n)
              ptx::wgmma_m64n128k16_ss_tb(dk, own.at(n * 32), q_operand.at(n * 16 * 128));
            ptx::wgmma_commit();
          };
          const auto add_dq = [&] {
            asm volatile("bar.arrive %0, 256;" ::"r"(3 - warpgroup) : "memory");
            float* to = dq + static_cast<int64_t>(step) * (2 * kStep * 64);
#pragma unroll
            for (int j = 0; j < 8; ++j)
              ptx::add_global_v4(to + j * 512, d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
          };
          if (step + 1 == item.step_end) {
            issue_ds();
            ptx::wgmma_wait<2>();
            release(&s.do_empty[stage]);
            ptx::wgmma_wait<0>();
            release(&s.q_empty[stage]);
            add_dq();
            break;
          }
          ptx::barrier_wait(&s.q_full[at.stage], at.parity);
          issue_product(x, keys + warpgroup * 64 * 128, ptx::shared_address(s.q[at.stage]));
          ptx::wgmma_wait<1>();
          release(&s.do_empty[stage]);
          issue_ds();
          ptx::wgmma_wait<1>();
          add_dq();
          ptx::barrier_wait(&s.do_full[at.stage], at.parity);
          issue_product(y, values + warpgroup * 64 * 128, ptx::shared_address(s.d_out[at.stage]));
          ptx::wgmma_wait<1>();
          release(&s.q_empty[stage]);
        }
      }
    } else {
      ptx::barrier_wait(&s.v_full, v_parity);
      release(&s.v_empty);
    }
    release(&s.k_empty[k_at.stage]);
    k_at.next();
    v_parity ^= 1;
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
      bool selected[2] = {false, false};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row[r] >= p.seqlen_k)
          row[r] = -1;
        else
          selected[r] = p.far_end[rows + row[r]] > p.far_begin[rows + row[r]];
      }
      wait_far();
      const int b = item.head / p.num_kv_heads, kv = item.head % p.num_kv_heads;
      const float *dk_far = p.dk_scratch + rows * kHeadDim, *dv_far = p.dv_scratch + rows * kHeadDim;
      store(p.dv + b * p.dv_batch + kv * p.dv_head, p.dv_seq, dv_far, dv, row, selected, true, 1.0f);
      store(p.dk + b * p.dk_batch + kv * p.dk_head, p.dk_seq, kFar ? nullptr : dk_far, dk, row, selected, true,
            p.scale);
      if (kFar)
        store(p.dk_far + b * p.dkf_batch + kv * p.dkf_head, p.dkf_seq, dk_far, dk, row, selected, false, p.scale);
    }
  }
  // Until every CTA has added its far items. All CTAs are resident and take far items first, so this ends.
  __device__ void wait_far() {
    if (far_known) return;
    if ((thread & 31) == 0) {
      while (ptx::load_acquire(p.far_done) < static_cast<int>(gridDim.x)) __nanosleep(100);
    }
    __syncwarp();
    far_known = true;
  }
  __device__ void run() {
    if (kDq) asm volatile("bar.arrive %0, 256;" ::"r"(3 - warpgroup) : "memory");
    Ring<2> item_at;
    bool far = true;
    while (true) {
      const Item item = wait_item(s, item_at);
      release(&s.item_empty[item_at.stage]);
      item_at.next();
      if (far && !(item.count > 0 && item.far)) {  // the first band item, or the end
        far = false;
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
    }
  }
};

// kDq: dQ too, by additions to scratch; else attention_bwd_dq_kernel makes it.
template <bool kSoft, bool kFar, bool kDq>
__global__ void __launch_bounds__(384, 1) attention_bwd_kernel(const __grid_constant__ BwdParams p) {
  extern __shared__ uint8_t raw[];
  BwdShared& s = *reinterpret_cast<BwdShared*>(raw);
  if (threadIdx.x == 0) {
    for (auto& barrier : s.item_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.item_empty) ptx::barrier_init(&barrier, 2 + 64 + 8);
    for (auto& barrier : s.k_full) ptx::barrier_init(&barrier, 128);
    for (auto& barrier : s.k_empty) ptx::barrier_init(&barrier, 8);
    ptx::barrier_init(&s.v_full, 64);
    ptx::barrier_init(&s.v_empty, 8);
    for (auto& barrier : s.q_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.do_full) ptx::barrier_init(&barrier, 1);
    for (auto& barrier : s.q_empty) ptx::barrier_init(&barrier, 8);
    for (auto& barrier : s.do_empty) ptx::barrier_init(&barrier, 8);
    ptx::fence_barrier_init();
  }
  // Rows that no step fills must hold numbers.
  for (int n = threadIdx.x; n < kBwdStages * kStepBytes / 16; n += blockDim.x) {
    reinterpret_cast<int4*>(s.q)[n] = reinterpret_cast<int4*>(s.d_out)[n] = int4{0, 0, 0, 0};
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_decrease<24>();
    if (threadIdx.x == 0)
      bwd_load_steps<kFar, true>(p, s);
    else if (threadIdx.x == 32)
      bwd_load_steps<kFar, false>(p, s);
    else if (threadIdx.x >= 64)
      bwd_load_keys(p, s, threadIdx.x - 64);
  } else {
    ptx::registers_increase<240>();
    BwdConsumer<kSoft, kFar, kDq>{p, s, warpgroup - 1, static_cast<int>(threadIdx.x % 128)}.run();
  }
}

}  // namespace sparsek::cuda::sm90
