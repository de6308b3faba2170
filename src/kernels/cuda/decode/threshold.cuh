// A sorted pool in shared memory with prefix sums, and eq. 2 on it with one score added. Every warp asks for itself, so
// that the search waits for no other: places are found by one comparison of each lane with a block's first score, and
// one inside the block.
#pragma once
#include <cstdint>

#include "kernels/cuda/decode/problem.cuh"

namespace sparsek::cuda::decode {

constexpr int kPoolCache = 4096;  // scores held in shared memory; of a larger pool one in 2^shift
constexpr int kPoolBlocks = kPoolCache / 32;

struct PoolShared {
  float scores[kPoolCache + kPoolCache / 16];  // gaps against bank conflicts, as below
  double prefix[kPoolCache / 2 + kPoolCache / 16 + 1];
  double warp_sum[kWarps];
};

struct SortedPool {
  PoolShared& s;
  const float* scores;  // all of them
  const int count;
  int shift = 0, prefix_shift = 1;  // one prefix sum every 2^prefix_shift scores
  // Sums are of u - reference, cut off: fractional keys are within 1 of the topk-th, wherever one more score moves
  // that, and others must not cost their digits.
  double reference = 0;
  float least = 0, most = 0;
  float head[kPoolBlocks / 32];  // first scores of blocks lane, lane + 32, ...

  __device__ float& cached(int n) const { return s.scores[n + (n >> 4)]; }
  __device__ double& prefix(int g) const { return s.prefix[g + (g >> 3)]; }
  __device__ float u(int n) const { return (n >> shift << shift) == n ? cached(n >> shift) : scores[n]; }
  __device__ double value_of(float x) const { return fminf(fmaxf(x, least), most) - reference; }
  __device__ double value(int n) const { return value_of(u(n)); }

  // `own`: the first kPoolCache scores, thread t has t, t + kThreads, ... All threads come.
  static constexpr int kEach = kPoolCache / kThreads;
  __device__ SortedPool(PoolShared& shared, const float* scores, int count, const float (&own)[kEach])
      : s(shared), scores(scores), count(count) {
    const int t = threadIdx.x;
    while (count > kPoolCache << shift) ++shift;
    prefix_shift = shift + 1;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = t + i * kThreads;
      const float x = shift == 0 ? own[i] : n << shift < count ? scores[n << shift] : 0.0f;
      cached(n) = n << shift < count ? x : -INFINITY;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPoolBlocks / 32; ++i) head[i] = cached(32 * ((t & 31) + 32 * i));
  }

  __device__ void make_prefix(int topk) {
    const int t = threadIdx.x;
    reference = u(topk - 1);
    least = u(topk - 1) - 3, most = u(max(topk - 2, 0)) + 3;
    const int groups = (count + (1 << prefix_shift) - 1) >> prefix_shift;
    constexpr int kGroups = kEach / 2;
    double before[kGroups], sum = 0;  // of each of the thread's groups
    if (shift == 0) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int n = 2 * (t * kGroups + g);
        before[g] = sum;
        const double two = value_of(cached(n)) + value_of(cached(n + 1));
        sum += n < count ? two : 0.0;  // what an odd count adds is in no sum that is asked for
      }
    } else {
#pragma unroll 1
      for (int g = t * kGroups; g < (t + 1) * kGroups; ++g) {
        if (g <= groups) prefix(g) = sum;
#pragma unroll 1
        for (int n = g << prefix_shift; n < min((g + 1) << prefix_shift, count); ++n) sum += value(n);
      }
    }
    double through = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, through, step);
      if ((t & 31) >= step) through += other;
    }
    if ((t & 31) == 31) s.warp_sum[t / 32] = through;
    __syncthreads();
    double earlier = through - sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) earlier += w < t / 32 ? s.warp_sum[w] : 0.0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      double& to = prefix(t * kGroups + g);
      if (t * kGroups + g <= groups) to = earlier + (shift == 0 ? before[g] : to);
    }
    if (t == kThreads - 1 && groups == kThreads * kGroups) prefix(groups) = earlier + sum;
    __syncthreads();
  }
  __device__ double sum_before(int n) const {
    double sum = prefix(n >> prefix_shift);
#pragma unroll 1
    for (int m = n >> prefix_shift << prefix_shift; m < n; ++m) sum += value(m);
    return sum;
  }

  // How many scores satisfy `holds`, which holds up to some place; all lanes get the same.
  template <class Holds>
  __device__ int count_while(Holds&& holds) const {
    const int lane = threadIdx.x & 31;
    int blocks = 0;
#pragma unroll
    for (int i = 0; i < kPoolBlocks / 32; ++i) blocks += __popc(__ballot_sync(0xffffffffu, holds(head[i])));
    if (blocks == 0) return 0;
    int found = 32 * (blocks - 1) + __popc(__ballot_sync(0xffffffffu, holds(cached(32 * (blocks - 1) + lane))));
    if (shift == 0 || found == 0) return min(found, count);
    // The last cached one, and scores behind it.
    const int first = (found - 1) << shift, end = min(found << shift, count);
    found = first;
#pragma unroll 1
    for (int n = first; n < end; n += 32) {
      found += __popc(__ballot_sync(0xffffffffu, n + lane < end && holds(scores[min(n + lane, count - 1)])));
    }
    return found;
  }
};

// tau of the pool's first `kept` scores and, with rank >= 0, `candidate` at that rank: the largest root of
// f(x) = sum clamp(u - x, 0, 1) - topk, rounded once. More than topk scores. Bracketed Newton: where ones and fractions
// stay what they are at the next point, their closed form is the root.
__device__ inline float threshold(const SortedPool& pool, int kept, int rank, float candidate, int topk) {
  const auto u = [&](int n) { return rank < 0 || n < rank ? pool.u(n) : n == rank ? candidate : pool.u(n - 1); };
  const double kth = u(topk - 1);
  // The topk largest alone make the sum, and nothing is fractional: the largest root is where the last begins to fall.
  if (static_cast<double>(u(topk)) <= kth - 1) return static_cast<float>(kth - 1);
  double low = kth - 1, high = kth, tau = kth - 0.4;  // 2 to 4 steps with normal scores; from `low` 4 to 6
#pragma unroll 1
  for (int step = 0; step < 100; ++step) {
    const float one = __double2float_ru(tau + 1), zero = __double2float_rd(tau);
    const int pool_ones = min(pool.count_while([&](float x) { return x >= one; }), kept),
              pool_support = min(pool.count_while([&](float x) { return x > zero; }), kept);
    int ones = pool_ones, support = pool_support;
    double sum = pool.sum_before(support) - pool.sum_before(ones);
    if (rank >= 0 && candidate > zero) {
      ++support;
      if (candidate >= one)
        ++ones;
      else
        sum += candidate - pool.reference;
    }
    const int fractional = support - ones;
    const double excess = sum + (ones - topk) - fractional * (tau - pool.reference);
    (excess > 0 ? low : high) = tau;
    // A float's digits are enough on the way.
    double next = tau + excess * static_cast<double>(__frcp_rn(static_cast<float>(fractional)));
    if (fractional > 0) {
      const float next_one = __double2float_ru(next + 1), next_zero = __double2float_rd(next);
      const bool stays = (pool_ones == 0 || pool.u(pool_ones - 1) >= next_one) &&
                         (pool_ones == kept || pool.u(pool_ones) < next_one) &&
                         (pool_support == 0 || pool.u(pool_support - 1) > next_zero) &&
                         (pool_support == kept || pool.u(pool_support) <= next_zero) &&
                         (candidate >= one) == (candidate >= next_one) && (candidate > zero) == (candidate > next_zero);
      if (stays || fabs(next - tau) <= 1e-15 * fmax(1.0, fabs(tau))) {
        return static_cast<float>(pool.reference + (sum + (ones - topk)) / fractional);
      }
    }
    if (!(next > low && next < high)) next = 0.5 * (low + high);
    tau = next;
  }
  return static_cast<float>(tau);
}

}  // namespace sparsek::cuda::decode
