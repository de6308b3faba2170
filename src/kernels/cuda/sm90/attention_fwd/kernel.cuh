// Attention forward, sm_90a: eq. 7-9.
//
// One CTA = 128 rows (positions x the group's heads) of one KV head. Warpgroup 0 loads blocks of 128 keys, the window
// band by TMA first, then the union of far rows visible to any query of the tile by cp.async; two warps of warpgroup 3
// build that union one tile ahead. Warpgroups 1 and 2 consume: 64 rows each, S = Q K^T and O += P V by wgmma, the next
// block's S in flight while the current P V runs.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/sm90/attention_fwd/tiles.cuh"

namespace sparsek::cuda::sm90 {

template <class ShapeType, bool kFar>
struct Shared : LoaderShared<ShapeType, kFar ? 2 : 1, kFar ? kMaxUnionOthers : kMaxUnionForward, 2, 2, 128> {};

constexpr int kLoaderRegisters = 48, kBuilderRegisters = 32, kConsumerRegisters = 216;

template <class ShapeType, bool kSoft, bool kFar>
struct Consumer {
  using Element = typename ShapeType::Element;
  static constexpr int kHeadDim = ShapeType::kHeadDim;
  using SharedType = Shared<ShapeType, kFar>;
  const FwdParams& p;
  SharedType& s;
  const int warpgroup, thread;  // warpgroup 0 or 1; thread 0-127
  int position[2];
  int window_low[2], window_high[2];
  float tau[2], reference[2], row_sum[2];  // reference: the maximum used, in powers of two
  float acc[kHeadDim / 2];
  Ring<SharedType::kStagesK> k_at;
  Ring<SharedType::kStagesV> v_at;

  template <int kCount>  // of keys / 2
  __device__ void issue_scores(float (&scores)[kCount], const uint8_t* q, const uint8_t* k) {
    const ptx::Operand a(ptx::shared_address(q) + warpgroup * 64 * 128, 16, 1024), b(ptx::shared_address(k), 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t offset = (step >> 2) * (kTile * 128) + (step & 3) * 32;
      ptx::wgmma_ss<Element, 2 * kCount>(scores, a.at(offset), b.at(offset), step != 0);
    }
    ptx::wgmma_commit();
  }
  template <int kKeys>
  __device__ void issue_values(const uint32_t (&probabilities)[32], const uint8_t* v) {
    const ptx::Operand b(ptx::shared_address(v), kTile * 128, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint32_t a[4] = {probabilities[step * 4], probabilities[step * 4 + 1], probabilities[step * 4 + 2],
                             probabilities[step * 4 + 3]};
      ptx::wgmma_rs<Element, kHeadDim>(acc, a, b.at(step * 16 * 128));
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
  template <int kCount>
  __device__ void mask_union(float (&scores)[kCount], const uint16_t* interval, int tile_first) {
    const int column0 = (thread & 3) * 2;
    const int query[2] = {position[0] - tile_first, position[1] - tile_first};
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
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
  template <int kCount>
  __device__ bool softmax(float (&scores)[kCount], float (&factor)[2]) {
    float block_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = fmaxf(scores[2 * r], scores[2 * r + 1]), b = fmaxf(scores[2 * r + 4], scores[2 * r + 5]);
#pragma unroll
      for (int e = 8; e < kCount; e += 8) {
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
      for (int e = 0; e < kCount; e += 4) {
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
  template <int kCount>
  __device__ void weigh(float (&scores)[kCount], const float* u_block) {
    const int column0 = (thread & 3) * 2;
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
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
    for (int e = 0; e < kHeadDim / 2; ++e) acc[e] = 0;
    const int band_blocks = (t.band_rows + kBlock - 1) / kBlock;
    const int inner_low = p.window_begin[static_cast<int64_t>(t.b) * p.seqlen_q + t.last],
              inner_high = p.num_carried + t.first;
    const bool full_tile = p.positions_per_tile * p.group == kTile && t.first + p.positions_per_tile <= p.seqlen_q;

    const int buffer = done & 1;
    int num_plain = 0, num_full = 0, blocks = band_blocks;
    bool tail = false;
    float scores[64];
    uint32_t probabilities[32];
    float factor[2];
    const auto prepare_union = [&](auto& block, int first) {
      if (first + kBlock > num_full || !full_tile) mask_union(block, &s.interval[buffer][first], t.first);
      const bool moved = softmax(block, factor);
      if (kSoft && first + kBlock > num_plain) weigh(block, &s.u[buffer][first]);
      return moved;
    };
    const auto prepare = [&](int n) {  // mask, softmax, weights of block n, whose products are in `scores`
      if (n >= band_blocks) return prepare_union(scores, (n - band_blocks) * kBlock);
      const int first = t.band_begin + n * kBlock;
      if (!full_tile || first < inner_low || first + kBlock - 1 > inner_high) mask_window(scores, first);
      return softmax(scores, factor);
    };
    const auto rescale = [&] {
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; ++e) acc[e] *= factor[(e >> 1) & 1];
    };
    const auto to_elements = [&](const auto& block) {
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(block) / sizeof(float)); e += 2)
        probabilities[e >> 1] = ptx::pack<Element>(block[e], block[e + 1]);
    };
    ptx::barrier_wait(&s.q_full, done & 1);
    ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
    issue_scores(scores, s.q[0], s.k[k_at.stage]);
    ptx::wgmma_wait<0>();
    release(&s.k_empty[k_at.stage]);
    k_at.next();
    prepare(0);
    to_elements(scores);
    const auto learn_union = [&] {
      ptx::barrier_wait(&s.union_full[buffer], (done >> 1) & 1);
      num_plain = s.num_plain[buffer];
      num_full = s.num_full[buffer];
      blocks = band_blocks + whole_blocks(s.num_far[buffer]);
      tail = has_tail(s.num_far[buffer]);
      row_sum[0] += s.cut[buffer], row_sum[1] += s.cut[buffer];  // from here on NaN, where rows are missing
    };
    if (band_blocks == 1) learn_union();
#pragma unroll 1
    for (int n = 1; n < blocks; ++n) {
      ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
      ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
      if (n >= band_blocks) ptx::fence_proxy_async();
      asm volatile("bar.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
      issue_scores(scores, s.q[kFar && n >= band_blocks], s.k[k_at.stage]);
      issue_values<kBlock>(probabilities, s.v[v_at.stage]);
      asm volatile("bar.arrive %0, 256;" ::"r"(3 - warpgroup) : "memory");
      ptx::wgmma_wait<1>();
      release(&s.k_empty[k_at.stage]);
      k_at.next();
      const bool moved = prepare(n);
      ptx::wgmma_wait<0>();
      release(&s.v_empty[v_at.stage]);
      v_at.next();
      if (moved) rescale();
      to_elements(scores);
      if (n == band_blocks - 1) learn_union();
    }
    if (tail) {
      float last[kTail / 2];
      ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
      ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
      ptx::fence_proxy_async();
      asm volatile("bar.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
      issue_scores(last, s.q[kFar], s.k[k_at.stage]);
      issue_values<kBlock>(probabilities, s.v[v_at.stage]);
      asm volatile("bar.arrive %0, 256;" ::"r"(3 - warpgroup) : "memory");
      ptx::wgmma_wait<1>();
      release(&s.k_empty[k_at.stage]);
      k_at.next();
      const bool moved = prepare_union(last, (blocks - band_blocks) * kBlock);
      ptx::wgmma_wait<0>();
      release(&s.v_empty[v_at.stage]);
      v_at.next();
      if (moved) rescale();
      to_elements(last);
    }
    release(&s.q_empty);
    release(&s.union_empty[buffer]);
    ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
    ptx::fence_proxy_async();
    if (tail)
      issue_values<kTail>(probabilities, s.v[v_at.stage]);
    else
      issue_values<kBlock>(probabilities, s.v[v_at.stage]);
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
      const float inverse = (row_sum[r] != 0 ? 1.0f / row_sum[r] : 0.0f) + poison;
      Bits16* out = p.out + t.b * p.o_batch + position[r] * p.o_seq + head_q * p.o_head + (thread & 3) * 2;
#pragma unroll
      for (int e = 0; e < kHeadDim / 2; e += 4) {
        *reinterpret_cast<uint32_t*>(out + (e >> 2) * 8) =
            ptx::pack<Element>(acc[e + 2 * r] * inverse, acc[e + 2 * r + 1] * inverse);
      }
      if ((thread & 3) == 0) {
        p.lse[(static_cast<int64_t>(t.b) * p.num_heads + head_q) * p.seqlen_q + position[r]] =
            (row_sum[r] != 0 ? (reference[r] + log2f(row_sum[r])) * 0.69314718055994531f : -INFINITY) + poison;
      }
    }
  }
};

template <class ShapeType, bool kSoft, bool kFar>
__global__ void __launch_bounds__(512, 1) attention_fwd_kernel(const __grid_constant__ FwdParams p) {
  using SharedType = Shared<ShapeType, kFar>;
  extern __shared__ uint8_t raw[];
  SharedType& s = *reinterpret_cast<SharedType*>(raw);
  const int total_tiles = (p.seqlen_q + p.positions_per_tile - 1) / p.positions_per_tile * p.batch * p.num_kv_heads;
  if (threadIdx.x == 0) s.initialise();
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_decrease<kLoaderRegisters>();
    Loader<SharedType, kFar> loader{p, s, {&p.q_map}};
    if (kFar) loader.q_maps[SharedType::kNumQueries - 1] = &p.q_far_map;
    loader.run(total_tiles);
  } else if (warpgroup == 3) {
    ptx::registers_decrease<kBuilderRegisters>();
    if (threadIdx.x < 448) Builder<kSoft, SharedType>{p, s}.run(total_tiles);
  } else {
    ptx::registers_increase<kConsumerRegisters>();
    Consumer<ShapeType, kSoft, kFar> consumer{p, s, warpgroup - 1, static_cast<int>(threadIdx.x % 128)};
    if (warpgroup == 2) asm volatile("bar.arrive 2, 256;" ::: "memory");
    for (int done = 0, index; (index = tile_of_round(done)) < total_tiles; ++done)
      consumer.run_tile(Tile(p, index), done);
  }
}

}  // namespace sparsek::cuda::sm90
