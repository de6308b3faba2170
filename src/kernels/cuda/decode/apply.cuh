// Second launch of a decode step: merges a unit's splits into out, softmax_lse and ring_mass, and changes its state as
// planned. Two CTAs per unit: what they read and write does not meet.
#pragma once
#include "kernels/cuda/decode/problem.cuh"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/ptx/instructions.cuh"

namespace sparsek::cuda::decode {

constexpr int kApplyThreads = 256;
constexpr float kLn2 = 0.69314718055994531f;

struct ApplyShared {
  float factor[kMaxGroup][kMaxSplits];  // of a split's sums, 1 / the whole sum included
  float near_lse[kMaxGroup];            // base 2, without slots
};

template <class Element, int kDim>
struct Apply {
  const Problem& p;
  ApplyShared& s;
  const int unit, t = threadIdx.x;
  const int batch_row, kv_head;
  const Plan plan;

  __device__ Apply(const Problem& problem, ApplyShared& shared, int unit)
      : p(problem),
        s(shared),
        unit(unit),
        batch_row(unit / p.params.num_kv_heads),
        kv_head(unit % p.params.num_kv_heads),
        plan(p.plans[unit]) {}

  __device__ static float warp_maximum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
  }
  __device__ static float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  // A warp per head, a lane per split.
  __device__ void merge_stats() {
    static_assert(kMaxSplits == 64);
    const float poison = plan.poisoned ? NAN : 0.0f;
#pragma unroll 1
    for (int head = t / 32; head < p.group; head += kApplyThreads / 32) {
      Stats own[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int split = (t & 31) + 32 * n;
        own[n] = split < p.num_splits ? p.stats[(int64_t{unit} * p.num_splits + split) * p.group + head]
                                      : Stats{-INFINITY, 0, -INFINITY, 0};
      }
      const float most = warp_maximum(fmaxf(own[0].maximum, own[1].maximum));
      const float near_most = warp_maximum(fmaxf(own[0].near_maximum, own[1].near_maximum));
      float factor[2], sum = 0, near_sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        factor[n] = own[n].maximum == -INFINITY ? 0.0f : exp2f(own[n].maximum - most);
        sum += factor[n] * own[n].sum;
        if (own[n].near_maximum != -INFINITY) near_sum += exp2f(own[n].near_maximum - near_most) * own[n].near_sum;
      }
      sum = warp_sum(sum), near_sum = warp_sum(near_sum);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int split = (t & 31) + 32 * n;
        if (split < p.num_splits) s.factor[head][split] = factor[n] / sum + poison;
      }
      if ((t & 31) != 0) continue;
      s.near_lse[head] = near_most + log2f(near_sum);
      if (p.params.softmax_lse) {
        static_cast<float*>(p.params.softmax_lse)[int64_t{unit} * p.group + head] = (most + log2f(sum)) * kLn2 + poison;
      }
    }
    __syncthreads();
  }

  // A thread's four values of out in one split.
  __device__ float4 part(int n, int split) const {
    const int head = n / (kDim / 4), dim = n % (kDim / 4) * 4;
    if (split >= p.num_splits) return {};
    return *reinterpret_cast<const float4*>(p.values +
                                            ((int64_t{unit} * p.num_splits + split) * p.group + head) * kDim + dim);
  }
  // Loads the thread's first parts before the statistics, which take as long to come.
  __device__ void merge() {
    constexpr int kAhead = 8;
    const int count = p.group * kDim / 4;
    float4 first[kAhead];
#pragma unroll
    for (int split = 0; split < kAhead; ++split) first[split] = t < count ? part(t, split) : float4{};
    merge_stats();
#pragma unroll 1
    for (int n = t; n < count; n += kApplyThreads) {
      const int head = n / (kDim / 4), dim = n % (kDim / 4) * 4;
      float4 total{};
#pragma unroll 1
      for (int base = 0; base < p.num_splits; base += kAhead) {
        if (n != t || base != 0) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) first[i] = part(n, base + i);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (base + i >= p.num_splits) break;
          const float factor = s.factor[head][base + i];
          total.x += factor * first[i].x, total.y += factor * first[i].y;
          total.z += factor * first[i].z, total.w += factor * first[i].w;
        }
      }
      uint16_t* out = static_cast<uint16_t*>(p.params.out) + (int64_t{unit} * p.group + head) * kDim + dim;
      *reinterpret_cast<uint2*>(out) = {ptx::pack<Element>(total.x, total.y), ptx::pack<Element>(total.z, total.w)};
    }
  }

  // eq. 1b: the new token's row starts at zero, this query adds to the rows of the window's older half.
  __device__ void add_mass() const {
    const int window = p.params.window_size;
    float* mass = static_cast<float*>(p.params.ring_mass) + int64_t{unit} * window;
#pragma unroll 1
    for (int row = t; row < window; row += kApplyThreads) {
      const int age = plan.new_row - row + (row > plan.new_row ? window : 0);
      if (age == 0) mass[row] = 0;
      if (age < p.older_age || age > plan.length) continue;
      float sum = 0;
#pragma unroll 4
      for (int head = 0; head < p.group; ++head) {
        sum += exp2f(p.logits[(int64_t{unit} * p.group + head) * window + row] - s.near_lse[head]);
      }
      mass[row] += sum;
    }
  }

  // Each 16-byte piece of a row is moved by one thread, the leaving key's before the new token takes its place.
  __device__ void move_rows() const {
    const DecodeStepParams& params = p.params;
    constexpr int kPieces = kDim / 8;
    if (t >= 3 * kPieces) return;
    const int what = t / kPieces, at = t % kPieces * 8;
    const auto place = [at](uint16_t* rows, int64_t row) { return reinterpret_cast<uint4*>(rows + row * kDim + at); };
    const auto piece = [&](const void* tensor, int64_t batch_stride, int64_t head_stride) {
      return *reinterpret_cast<const uint4*>(row_of(tensor, batch_row, batch_stride, kv_head, head_stride) + at);
    };
    const uint4 near_k = piece(params.k, params.k_stride_batch, params.k_stride_head);
    if (what == 2) {
      if (params.ring_k)
        *place(static_cast<uint16_t*>(params.ring_k), int64_t{unit} * params.window_size + plan.new_row) = near_k;
      return;
    }
    const uint4 fresh = what == 1       ? piece(params.v, params.v_stride_batch, params.v_stride_head)
                        : params.ring_k ? piece(params.k_far, params.k_far_stride_batch, params.k_far_stride_head)
                                        : near_k;
    uint16_t* rows = static_cast<uint16_t*>(what == 0 ? params.state_k : params.state_v) + unit * p.state_rows() * kDim;
    uint4* ring = place(rows, int64_t{params.num_sinks} + plan.new_row);
    if (plan.slot >= 0) *place(rows, int64_t{params.num_sinks} + params.window_size + plan.slot) = *ring;
    *ring = fresh;
    if (plan.length < params.num_sinks) *place(rows, plan.length) = fresh;
  }

  // The candidate's place in the pool: what ranks behind it moves by one, tile by tile from the end.
  __device__ void change_pool() const {
    constexpr int kEach = 16, kTile = kEach * kApplyThreads;
    float* pool = p.pool(unit);
    if (plan.rank >= 0) {
      const int moved = plan.num_pooled - 1 - plan.rank;  // scores from `rank` on that stay in the pool
#pragma unroll 1
      for (int begin = (moved - 1) / kTile * kTile; moved > 0 && begin >= 0; begin -= kTile) {
        float own[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int n = begin + t + i * kApplyThreads;
          own[i] = n < moved ? pool[plan.rank + n] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int n = begin + t + i * kApplyThreads;
          if (n < moved) pool[plan.rank + n + 1] = own[i];
        }
        __syncthreads();
      }
      if (t == 0) pool[plan.rank] = plan.candidate;
    }
    // Stays at the top: what selects next finds it (num_pooled > 0: a candidate has come).
    if (t == 0 && plan.poisoned) pool[0] = NAN;
  }

  __device__ void change_state() const {
    const DecodeStepParams& params = p.params;
    move_rows();
    change_pool();
    if (t != 0) return;
    if (plan.slot >= 0) {
      p.slot_scores(unit)[plan.slot] = plan.candidate;
      p.slot_positions(unit)[plan.slot] = plan.length - params.window_size;
    }
    if (!params.candidate_scores) {
      static_cast<float*>(params.ring_scores)[int64_t{unit} * params.window_size + plan.new_row] =
          static_cast<const float*>(params.scores)[unit];
    }
    if (kv_head == 0) params.lengths[batch_row] = plan.length + 1;
  }
};

template <class Element, int kDim>
__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const __grid_constant__ Problem p) {
  __shared__ ApplyShared s;
  const int units = p.units();
  wait_for_previous_kernel();
  if (blockIdx.x < units) {
    Apply<Element, kDim> apply(p, s, blockIdx.x);
    apply.merge();
    if (p.params.ring_mass) apply.add_mass();
  } else {
    Apply<Element, kDim>(p, s, blockIdx.x - units).change_state();
  }
}

}  // namespace sparsek::cuda::decode
