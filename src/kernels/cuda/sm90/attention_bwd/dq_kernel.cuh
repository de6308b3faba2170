// dQ of the attention backward, sm_90a: query-major, three products a block. Tiles, loading and the union are the
// forward's. S and dP in registers, dS from registers into dQ += dS K. With far rotary the window's sum is stored
// before the union's begins: they are the gradients of q and q_far.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/sm90/attention_fwd/tiles.cuh"

namespace sparsek::cuda::sm90 {

struct DqParams {
  FwdParams fwd;              // out and lse are not read
  CUtensorMap do_map;         // like fwd.q_map
  const float *lse2, *delta;  // [batch * num_heads, seqlen_q]
  Bits16 *dq, *dq_far;        // strides as dq's; dq_far: null without far rotary
  float* h_query;             // [batch * num_kv_heads, seqlen_q], zeroed; null: no score gradient
  int64_t dq_batch, dq_seq, dq_head;
  float scale;
};

// q[0]: Q, q[1]: dO, q[2]: Q_far. With far rotary and head_dim 128 there is room for one stage of V.
template <class ShapeType, bool kFar>
struct DqShared
    : LoaderShared<ShapeType, kFar ? 3 : 2, kMaxUnionOthers, 2, kFar && ShapeType::kHeadDim == 128 ? 1 : 2, 64> {};

constexpr int kDqProducerRegisters = 56, kDqConsumerRegisters = 224;

template <class ShapeType, bool kSoft, bool kFar>
struct DqConsumer {
  using Element = typename ShapeType::Element;
  using SharedType = DqShared<ShapeType, kFar>;
  static constexpr int kHeadDim = ShapeType::kHeadDim;
  const DqParams& dp;
  const FwdParams& p;
  SharedType& s;
  const int warpgroup, thread;
  int position[2], window_low[2], window_high[2];
  float tau[2], lse2[2], delta[2], h[2];
  float dq[kHeadDim / 2];
  Ring<SharedType::kStagesK> k_at;
  Ring<SharedType::kStagesV> v_at;

  __device__ void release(uint64_t* barrier) {
    __syncwarp();
    if ((thread & 31) == 0) ptx::barrier_arrive(barrier);
  }
  template <int kCount>  // of keys / 2
  __device__ void issue_product(float (&d)[kCount], const uint8_t* rows, const uint8_t* keys) {
    const ptx::Operand a(ptx::shared_address(rows) + warpgroup * 64 * 128, 16, 1024),
        b(ptx::shared_address(keys), 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t offset = (step >> 2) * (kTile * 128) + (step & 3) * 32;
      ptx::wgmma_ss<Element, 2 * kCount>(d, a.at(offset), b.at(offset), step != 0);
    }
    ptx::wgmma_commit();
  }
  template <int kCount>  // of keys / 4
  __device__ void issue_dq(const uint32_t (&ds)[kCount], const uint8_t* keys) {
    const ptx::Operand b(ptx::shared_address(keys), kTile * 128, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kCount / 4; ++step) {
      const uint32_t a[4] = {ds[step * 4], ds[step * 4 + 1], ds[step * 4 + 2], ds[step * 4 + 3]};
      ptx::wgmma_rs<Element, kHeadDim>(dq, a, b.at(step * 16 * 128));
    }
    ptx::wgmma_commit();
  }

  // dq to memory, then zero.
  __device__ void store(const Tile& t, Bits16* gradient) {
    const int lane = ptx::lane(), tile_row = warpgroup * 64 + (ptx::thread() >> 5 & 3) * 16 + (lane >> 2),
              column0 = (lane & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (position[r] >= 0) {
        Bits16* out = gradient + t.b * dp.dq_batch + position[r] * dp.dq_seq +
                      (t.kv * p.group + (tile_row + 8 * r) % p.group) * dp.dq_head + column0;
#pragma unroll
        for (int e = 0; e < kHeadDim / 2; e += 4)
          *reinterpret_cast<uint32_t*>(out + (e >> 2) * 8) =
              ptx::pack<Element>(dq[e + 2 * r] * dp.scale, dq[e + 2 * r + 1] * dp.scale);
      }
    }
#pragma unroll
    for (int e = 0; e < kHeadDim / 2; ++e) dq[e] = 0;
  }

  __device__ void run_tile(const Tile& t, int done) {
    const int64_t head = static_cast<int64_t>(t.b) * p.num_kv_heads + t.kv;
    const int tile_row = warpgroup * 64 + (thread >> 5) * 16 + ((thread & 31) >> 2), column0 = (thread & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile_row + 8 * r, i = t.first + row / p.group;
      const bool valid = row < p.positions_per_tile * p.group && i < p.seqlen_q;
      const int64_t at = (static_cast<int64_t>(t.b) * p.num_heads + t.kv * p.group + row % p.group) * p.seqlen_q + i;
      position[r] = valid ? i : -1;
      window_low[r] = valid ? p.window_begin[static_cast<int64_t>(t.b) * p.seqlen_q + i] : INT32_MAX;
      window_high[r] = valid ? p.num_carried + i : -1;
      tau[r] = valid ? p.tau[head * p.seqlen_q + i] : 0;
      lse2[r] = valid ? dp.lse2[at] : INFINITY;
      delta[r] = valid ? dp.delta[at] : 0;
      h[r] = 0;
    }
#pragma unroll
    for (int e = 0; e < kHeadDim / 2; ++e) dq[e] = 0;
    const int band_blocks = (t.band_rows + kBlock - 1) / kBlock;
    const int inner_low = p.window_begin[static_cast<int64_t>(t.b) * p.seqlen_q + t.last],
              inner_high = p.num_carried + t.first;
    const bool full_tile = p.positions_per_tile * p.group == kTile && t.first + p.positions_per_tile <= p.seqlen_q;
    const int buffer = done & 1;
    int num_plain = 0, num_full = 0, blocks = band_blocks;
    bool tail = false;
    const auto learn_union = [&] {
      ptx::barrier_wait(&s.union_full[buffer], (done >> 1) & 1);
      num_plain = s.num_plain[buffer];
      num_full = s.num_full[buffer];
      blocks = band_blocks + whole_blocks(s.num_far[buffer]);
      tail = has_tail(s.num_far[buffer]);
      lse2[0] += s.cut[buffer], lse2[1] += s.cut[buffer];  // the gradient becomes NaN where rows are missing
    };
    if (!kFar && band_blocks == 1) learn_union();
    ptx::barrier_wait(&s.q_full, done & 1);
    const auto exponentials = [&](auto& block) {
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(block) / sizeof(float)); ++e)
        block[e] = ptx::exp2_approx(block[e] * p.scale_log2 - lse2[(e >> 1) & 1]);
    };
    const auto mask_union = [&](auto& block, int first) {
      if (first + kBlock <= num_full && full_tile) return;
      const int query[2] = {position[0] - t.first, position[1] - t.first};
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(block) / sizeof(float)); e += 4) {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(&s.interval[buffer][first + (e >> 2) * 8 + column0]);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t begin = (both >> (16 * c)) & 255, length = (both >> (16 * c + 8)) & 255;
          if (query[0] - begin >= length) block[e + c] = 0;
          if (query[1] - begin >= length) block[e + 2 + c] = 0;
        }
      }
    };
    // dS of rows at weights below 1, with eq. 10's sums.
    const auto weighted = [&](uint32_t* ds, const auto& block, const auto& products, int first) {
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(block) / sizeof(float)); e += 4) {
        const float2 u = *reinterpret_cast<const float2*>(&s.u[buffer][first + (e >> 2) * 8 + column0]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float value[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float probability = block[e + 2 * r + c], weight = (c == 0 ? u.x : u.y) - tau[r];
            float gated = products[e + 2 * r + c];
            h[r] += weight > 0 && weight < 1 ? probability * gated : 0.0f;
            if (kSoft) gated *= __saturatef(weight);
            value[c] = probability * (gated - delta[r]);
          }
          ds[e / 2 + r] = ptx::pack<Element>(value[0], value[1]);
        }
      }
    };
    const auto unweighted = [&](uint32_t* ds, const auto& block, const auto& products) {
#pragma unroll
      for (int e = 0; e < static_cast<int>(sizeof(block) / sizeof(float)); e += 2) {
        const int r = (e >> 1) & 1;
        ds[e >> 1] =
            ptx::pack<Element>(block[e] * (products[e] - delta[r]), block[e + 1] * (products[e + 1] - delta[r]));
      }
    };
    float x[64], y[64];  // S then P, dP
                         // One pass over all blocks; with far rotary one over the window's and one over the union's.
#pragma unroll 1
    for (bool far = false;; far = true) {
      const uint8_t* queries = s.q[far ? SharedType::kNumQueries - 1 : 0];
      int n = far ? band_blocks : 0;
      if (n < blocks) {
        ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
        if (far) ptx::fence_proxy_async();
        issue_product(x, queries, s.k[k_at.stage]);
        ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
        if (far) ptx::fence_proxy_async();
        issue_product(y, s.q[1], s.v[v_at.stage]);
        ptx::wgmma_wait<1>();
#pragma unroll 1
        for (;; ++n) {
          const int first = n < band_blocks ? t.band_begin + n * kBlock : (n - band_blocks) * kBlock;
          exponentials(x);
          if (n < band_blocks) {
            if (!full_tile || first < inner_low || first + kBlock - 1 > inner_high) {
#pragma unroll
              for (int e = 0; e < 64; ++e) {
                const int r = (e >> 1) & 1, row = first + (e >> 2) * 8 + column0 + (e & 1);
                if (row < window_low[r] || row > window_high[r]) x[e] = 0;
              }
            }
          } else {
            mask_union(x, first);
          }
          ptx::wgmma_wait<0>();
          release(&s.v_empty[v_at.stage]);
          v_at.next();
          uint32_t ds[32];
          if (n >= band_blocks && first + kBlock > num_plain)
            weighted(ds, x, y, first);
          else
            unweighted(ds, x, y);
          if (!kFar && n == band_blocks - 1 && n > 0) learn_union();
          const uint8_t* keys = s.k[k_at.stage];
          uint64_t* k_empty = &s.k_empty[k_at.stage];
          k_at.next();
          if (n + 1 == blocks) {
            if (!tail) {
              if (!kFar) {
                release(&s.q_empty);
                release(&s.union_empty[buffer]);
              }
              issue_dq(ds, keys);
              ptx::wgmma_wait<0>();
              release(k_empty);
              break;
            }
            const int last = (blocks - band_blocks) * kBlock;
            float tail_x[kTail / 2], tail_y[kTail / 2];
            ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
            ptx::fence_proxy_async();
            issue_product(tail_x, queries, s.k[k_at.stage]);
            issue_dq(ds, keys);
            ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
            ptx::fence_proxy_async();
            ptx::wgmma_wait<0>();
            release(k_empty);
            issue_product(tail_y, s.q[1], s.v[v_at.stage]);
            exponentials(tail_x);
            mask_union(tail_x, last);
            ptx::wgmma_wait<0>();
            release(&s.v_empty[v_at.stage]);
            v_at.next();
            uint32_t tail_ds[kTail / 4];
            if (last + kBlock > num_plain)
              weighted(tail_ds, tail_x, tail_y, last);
            else
              unweighted(tail_ds, tail_x, tail_y);
            if (!kFar) {
              release(&s.q_empty);
              release(&s.union_empty[buffer]);
            }
            issue_dq(tail_ds, s.k[k_at.stage]);
            ptx::wgmma_wait<0>();
            release(&s.k_empty[k_at.stage]);
            k_at.next();
            break;
          }
          ptx::barrier_wait(&s.k_full[k_at.stage], k_at.parity);
          if (n + 1 >= band_blocks) ptx::fence_proxy_async();
          issue_product(x, queries, s.k[k_at.stage]);
          issue_dq(ds, keys);
          ptx::barrier_wait(&s.v_full[v_at.stage], v_at.parity);
          if (n + 1 >= band_blocks) ptx::fence_proxy_async();
          ptx::wgmma_wait<0>();
          release(k_empty);
          issue_product(y, s.q[1], s.v[v_at.stage]);
        }
      }
      store(t, far ? dp.dq_far : dp.dq);
      if (!kFar || far) break;
      learn_union();
    }
    if (kFar) {
      release(&s.q_empty);
      release(&s.union_empty[buffer]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      h[r] += __shfl_xor_sync(0xffffffffu, h[r], 1);
      h[r] += __shfl_xor_sync(0xffffffffu, h[r], 2);
      if (dp.h_query != nullptr && (thread & 3) == 0 && position[r] >= 0)
        ptx::add_global(dp.h_query + head * p.seqlen_q + position[r], h[r]);
    }
  }
};

template <class ShapeType, bool kSoft, bool kFar>
__global__ void __launch_bounds__(384, 1) attention_bwd_dq_kernel(const __grid_constant__ DqParams dp) {
  using SharedType = DqShared<ShapeType, kFar>;
  extern __shared__ uint8_t raw[];
  SharedType& s = *reinterpret_cast<SharedType*>(raw);
  const FwdParams& p = dp.fwd;
  const int total_tiles = (p.seqlen_q + p.positions_per_tile - 1) / p.positions_per_tile * p.batch * p.num_kv_heads;
  if (threadIdx.x == 0) s.initialise();
  // Rows that no tile fills must hold numbers.
  for (int n = threadIdx.x; n < SharedType::kNumQueries * ShapeType::kTileBytes / 16; n += blockDim.x)
    reinterpret_cast<int4*>(s.q)[n] = int4{0, 0, 0, 0};
  ptx::fence_proxy_async();
  __syncthreads();
  // Nothing here waits for the dk kernel, which let this one start when all before it had ended.
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  let_next_kernel_start();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_decrease<kDqProducerRegisters>();
    // Warps 2 and 3 build the next tile's union while warps 0 and 1 load the band; all gather.
    Loader<SharedType, kFar> loader{p, s, {&p.q_map, &dp.do_map}};
    if (kFar) loader.q_maps[SharedType::kNumQueries - 1] = &p.q_far_map;
    Builder<true, SharedType> builder{p, s};
    const bool builds = threadIdx.x >= 64;
    for (int done = -1, index = 0;; ++done) {
      const int next = tile_of_round(done + 1);
      if (builds && next < total_tiles) builder.one(next, done + 1);
      if (done >= 0) {
        const Tile t(p, index);
        if (builds)
          loader.skip(t);
        else
          loader.band(t, done);
        // The waits of far() know one phase of the stages: be no more than that behind.
        asm volatile("bar.sync 2, 128;" ::: "memory");
        loader.far(t, done);
      }
      if (next >= total_tiles) break;
      index = next;
    }
    wait_for_previous_kernel();  // whoever waits for this kernel waits for both
  } else {
    ptx::registers_increase<kDqConsumerRegisters>();
    DqConsumer<ShapeType, kSoft, kFar> consumer{dp, p, s, warpgroup - 1, static_cast<int>(threadIdx.x % 128)};
    for (int done = 0, index; (index = tile_of_round(done)) < total_tiles; ++done)
      consumer.run_tile(Tile(p, index), done);
  }
}

}  // namespace sparsek::cuda::sm90
