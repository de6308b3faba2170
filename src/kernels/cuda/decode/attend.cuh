// First launch of a decode step: the attention of a unit's query heads over a split of its rows (eq. 7-9), online
// softmax, warp by warp. K and V go from memory straight into the registers of mma.sync, without shared memory: a
// product's order of head dimensions and of keys is free, so every thread reads 16 bytes at a time.
//   * logits[key, head] = K Q^T: A = K. Thread 4 g + c holds keys g and g + 8, of each 32 dimensions those from 8 c on.
//   * out[dim, head] = V^T P: A = V^T, two neighbouring keys paired by byte permutation. Thread 4 g + c holds keys
//     2 c, 2 c + 1, 2 c + 8 and 2 c + 9, of each 64 dimensions those from 8 g on. B = P, the transposed logits.
// A warp has 16 rows of K and of V on their way: 16 warps keep 128 KB per multiprocessor in flight (head_dim 128).
#pragma once
#include "kernels/cuda/decode/attend_rows.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/ptx/mma_sync.cuh"

namespace sparsek::cuda::decode {

template <class Element, int kDim, int kHeadTiles>
struct Attend : AttendRows<kDim, kHeadTiles> {
  using Rows = AttendRows<kDim, kHeadTiles>;
  using Rows::c, Rows::first_head, Rows::g, Rows::k, Rows::kChunks, Rows::kQueriesEach, Rows::kQueryPieces,
      Rows::kSpans;
  using Rows::num_heads, Rows::p, Rows::s, Rows::split, Rows::t, Rows::unit, Rows::v, Rows::warp;
  using Rows::Rows;

  // Per 16 dimensions: (dim, head 2 c), (dim, head 2 c + 1), and both for the next dim.
  float accumulators[kHeadTiles][kDim / 16][4];
  float maximum[kHeadTiles][2], sum[kHeadTiles][2];  // of heads 2 c and 2 c + 1; sums over the thread's rows

  // Maximum and sum so far, of all lanes.
  __device__ void store_stats(float2 (&to)[kWarps][kHeadTiles * kHeadTile]) const {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float total = sum[tile][n];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        if (g == 0) to[warp][tile * kHeadTile + 2 * c + n] = {maximum[tile][n], total};
      }
    }
  }

  // K's tile times the queries: logits in base 2, -inf where nothing is visible.
  __device__ void make_logits(float (&logits)[kHeadTiles][4], int index, Visible see) const {
    const int far = index < p.sink_tiles || index >= p.first_slot_tile;
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < 4; ++n) logits[tile][n] = 0;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 q = ptx::load_shared(ptx::shared_address(&s.q[far][tile][chunk][t & 31]));
        const uint4 &low = k[0][chunk], &high = k[1][chunk];
        ptx::mma_m16n8k16<Element>(logits[tile], {low.x, high.x, low.y, high.y}, q.x, q.y);
        ptx::mma_m16n8k16<Element>(logits[tile], {low.z, high.z, low.w, high.w}, q.z, q.w);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        logits[tile][n] = see.row(g + 8 * (n >> 1)) ? logits[tile][n] * p.scale_log2 : -INFINITY;
      }
    }
  }

  // For eq. 1b: the logits of the ring's older half.
  __device__ void store_logits(const float (&logits)[kHeadTiles][4], int index) const {
    const int window = p.params.window_size, new_row = s.facts.new_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (index - p.sink_tiles) * kTileRows + g + 8 * half;
      const int age = new_row - row + (row > new_row ? window : 0);
      if (row >= window || age < p.older_age) continue;
#pragma unroll
      for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int head = tile * kHeadTile + 2 * c + n;
          if (head >= s.facts.num_heads) continue;
          s.facts.logits[int64_t{head} * window + row] = logits[tile][2 * half + n];
        }
      }
    }
  }

  // Adds a tile to the running softmax; its values' weights as fragments.
  __device__ void weigh(float (&logits)[kHeadTiles][4], const float (&gate)[2], uint32_t (&weights)[kHeadTiles][2]) {
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      float most[2] = {fmaxf(logits[tile][0], logits[tile][2]), fmaxf(logits[tile][1], logits[tile][3])};
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], step));
        most[1] = fmaxf(most[1], __shfl_xor_sync(0xffffffffu, most[1], step));
      }
      const bool rises = most[0] > maximum[tile][0] || most[1] > maximum[tile][1];
      if (__any_sync(0xffffffffu, rises)) {
        float factor[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float next = fmaxf(maximum[tile][n], most[n]);
          factor[n] = next == -INFINITY ? 1.0f : ptx::exp2_approx(maximum[tile][n] - next);
          maximum[tile][n] = next;
          sum[tile][n] *= factor[n];
        }
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
          for (int n = 0; n < 4; ++n) accumulators[tile][m][n] *= factor[n & 1];
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float reference = maximum[tile][n & 1] == -INFINITY ? 0.0f : maximum[tile][n & 1];
        logits[tile][n] = ptx::exp2_approx(logits[tile][n] - reference);
        sum[tile][n & 1] += logits[tile][n];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[tile][half] = ptx::transpose_matrix(
            ptx::pack<Element>(logits[tile][2 * half] * gate[half], logits[tile][2 * half + 1] * gate[half]));
      }
    }
  }

  __device__ static uint32_t word(const uint4& x, int n) { return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w; }

  __device__ void add_values(const uint32_t (&weights)[kHeadTiles][2]) {
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // dimensions 2 n and 2 n + 1 of the eight
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t first = word(v[2 * half][span], n), second = word(v[2 * half + 1][span], n);
          a[2 * half] = __byte_perm(first, second, 0x5410);
          a[2 * half + 1] = __byte_perm(first, second, 0x7632);
        }
#pragma unroll
        for (int tile = 0; tile < kHeadTiles; ++tile) {
          ptx::mma_m16n8k16<Element>(accumulators[tile][4 * span + n], a, weights[tile][0], weights[tile][1]);
        }
      }
    }
  }

  // Merges the warps and writes the split's results.
  __device__ void finish() {
    const int64_t row = s.facts.first_result;
    const int num_heads = s.facts.num_heads;
    store_stats(s.all);
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
      __syncthreads();  // the plan's memory, or the tile before, has been read
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto& from = accumulators[tile];
          float4* to = reinterpret_cast<float4*>(&s.values[warp][2 * c + n][64 * span + 8 * g]);
          to[0] = {from[4 * span][n], from[4 * span][n + 2], from[4 * span + 1][n], from[4 * span + 1][n + 2]};
          to[1] = {from[4 * span + 2][n], from[4 * span + 2][n + 2], from[4 * span + 3][n], from[4 * span + 3][n + 2]};
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int n = t; n < kHeadTile * kDim / 4; n += kThreads) {
        const int head = n / (kDim / 4), dim = n % (kDim / 4) * 4, of_part = tile * kHeadTile + head;
        if (of_part >= num_heads) break;
        float most = -INFINITY;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) most = fmaxf(most, s.all[w][of_part].x);
        float4 total{};
        float whole = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float factor = s.all[w][of_part].x == -INFINITY ? 0.0f : ptx::exp2_approx(s.all[w][of_part].x - most);
          const float4 x = *reinterpret_cast<const float4*>(&s.values[w][head][dim]);
          total.x += factor * x.x, total.y += factor * x.y, total.z += factor * x.z, total.w += factor * x.w;
          whole += factor * s.all[w][of_part].y;
        }
        *reinterpret_cast<float4*>(p.values + (row + of_part) * kDim + dim) = total;
        if (dim != 0) continue;
        float near_most = -INFINITY, near_sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) near_most = fmaxf(near_most, s.near[w][of_part].x);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (s.near[w][of_part].x != -INFINITY) {
            near_sum += ptx::exp2_approx(s.near[w][of_part].x - near_most) * s.near[w][of_part].y;
          }
        }
        p.stats[row + of_part] = {most, whole, near_most, near_sum};
      }
    }
  }

  __device__ void run() {
    const int begin = split * p.tiles_per_split, end = min(begin + p.tiles_per_split, p.num_tiles);
    const bool has_slots = end > p.first_slot_tile;
    PlanInputs in;
    in.length = p.params.lengths[Rows::batch_row];
#pragma unroll
    for (int i = 0; i < SortedPool::kEach; ++i) {
      const int n = t + i * kThreads;
      in.pool[i] = has_slots && n < p.params.pool_size ? p.pool(unit)[n] : 0.0f;
    }
    uint4 queries[kQueriesEach];
#pragma unroll
    for (int i = 0; i < kQueriesEach; ++i) queries[i] = this->query_piece(t + i * kThreads);
    in.new_row = ring_row(in.length, p.params.window_size);
    in.candidate = has_slots ? p.candidate_score(unit, in.new_row) : 0.0f;
    this->prefetch_tiles(begin, end);  // behind what the plan waits for
    let_next_kernel_start();
#pragma unroll
    for (int i = 0; i < kQueriesEach; ++i) {
      const int n = t + i * kThreads;
      if (n < kQueryPieces) (&s.q[0][0][0][0])[n] = queries[i];
    }
    Plan plan{};
    plan.length = in.length, plan.new_row = in.new_row;
    if (has_slots) {
      plan = make_plan(p, unit, in, s.plan);
      if (t == 0 && end == p.num_tiles && first_head == 0) p.plans[unit] = plan;
    }
    this->describe_regions(plan, end);
#pragma unroll
    for (int tile = 0; tile < kHeadTiles; ++tile) {
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) accumulators[tile][m][n] = 0;
      }
      maximum[tile][0] = maximum[tile][1] = -INFINITY;
      sum[tile][0] = sum[tile][1] = 0;
    }
    __syncthreads();
    int index = begin + warp;  // the tile that is in registers
    Visible see{};
    index = this->next_tile(index, see);
    if (index < s.facts.end) {
      this->load_k(index, see);
      this->load_v(index, see);
    }
#pragma unroll 1
    while (index < s.facts.end) {
      if (index >= p.first_slot_tile && !s.facts.has_near[warp]) {
        store_stats(s.near);
        __syncwarp();  // all lanes have seen that it was not
        s.facts.has_near[warp] = true;
        __syncwarp();
      }
      float logits[kHeadTiles][4];
      make_logits(logits, index, see);
      float gate[2] = {1.0f, 1.0f};
      if (index >= p.first_slot_tile) {
        ptx::copy_async_wait_all();
        __syncwarp();
        const float tau = s.facts.tau;
        gate[0] = __saturatef(s.u[warp][g] - tau), gate[1] = __saturatef(s.u[warp][g + 8] - tau);
        __syncwarp();
      } else if (p.logits && index >= p.sink_tiles) {
        store_logits(logits, index);
      }
      uint32_t weights[kHeadTiles][2];
      weigh(logits, gate, weights);
      const int next = this->next_tile(index + kWarps, see);
      const bool more = next < s.facts.end;
      if (more) this->load_k(next, see);  // not before weigh: registers
      add_values(weights);
      if (more) this->load_v(next, see);
      index = next;
    }
    if (!s.facts.has_near[warp]) store_stats(s.near);  // it has met no slots
    finish();
  }
};

template <class Element, int kDim, int kHeadTiles>
__global__ void __launch_bounds__(kThreads, kHeadTiles == 1 ? 2 : 1) attend_kernel(const __grid_constant__ Problem p) {
  __shared__ __align__(16) uint8_t memory[sizeof(AttendShared<kDim, kHeadTiles>)];
  auto& s = *reinterpret_cast<AttendShared<kDim, kHeadTiles>*>(memory);
  const int part = blockIdx.x % p.head_parts, split = blockIdx.x / p.head_parts % p.num_splits;
  const int unit = blockIdx.x / (p.head_parts * p.num_splits);
  Attend<Element, kDim, kHeadTiles>(p, s, unit, split, part).run();
}

}  // namespace sparsek::cuda::decode
