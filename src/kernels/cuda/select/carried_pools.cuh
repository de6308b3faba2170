// The first two kernels of select_chunk: candidates by rank, the carried pool and its slots; then the pool before each
// stretch of queries.
#pragma once
#include "kernels/cuda/select/carried.cuh"

namespace sparsek::cuda::selection {

constexpr int kCarriedThreads = 512;

// A bitonic sort of one stretch's candidates.
__device__ inline void sort_stretch(const CarriedProblem& p, int lane, int index) {
  __shared__ uint64_t keys[kStretch];
  __shared__ int first_bad;
  const int t = threadIdx.x, begin = index * kStretch, first = p.first_query(lane);
  if (t == 0) first_bad = INT32_MAX;
  __syncthreads();
  for (int n = t; n < kStretch; n += kCarriedThreads) {
    const int query = begin + n;
    keys[n] = kNoKey;
    if (query < first || query >= p.params.chunk) continue;
    const float u = p.candidate(lane, query);
    keys[n] = rank_key(u, p.params.pool_capacity + query);
    if (!isfinite(u)) atomicMin(&first_bad, query);
  }
  __syncthreads();
#pragma unroll 1
  for (int size = 2; size <= kStretch; size *= 2) {
#pragma unroll 1
    for (int step = size / 2; step > 0; step /= 2) {
      const int low = 2 * t - (t & (step - 1)), high = low + step;
      const uint64_t a = keys[low], b = keys[high];
      if ((a > b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
      __syncthreads();
    }
  }
  const int64_t to = p.stretch(lane, index);
  for (int n = t; n < kStretch; n += kCarriedThreads) p.sorted[to * kStretch + n] = keys[n];
  if (t == 0) p.first_bad[to] = first_bad;
}

// The carried pool as keys. Slots stand in any order: their ranks are those of their scores, and among equal scores
// those of their positions.
__device__ inline void carry_pool(const CarriedProblem& p, int lane) {
  const int t = threadIdx.x, count = min(p.num_carried(lane), p.limit), topk = p.params.topk;
  const float* scores = p.pool_scores(lane);
  uint64_t* pool = p.pools + p.pool(lane, 0) * p.limit;
  for (int n = t; n < count; n += kCarriedThreads) pool[n] = rank_key(scores[n], n);
  if (t == 0) p.pool_counts[p.pool(lane, 0)] = count;
  const float* slot_scores = static_cast<const float*>(p.params.slot_scores) + int64_t{lane} * topk;
  const int64_t* positions = p.params.slot_positions + int64_t{lane} * topk;
  int32_t* slot_of_rank = p.slot_of_rank + int64_t{lane} * topk;
  int32_t* rank_of_slot = p.rank_of_slot + int64_t{lane} * topk;
  for (int n = t; n < topk; n += kCarriedThreads) slot_of_rank[n] = -1;
  __syncthreads();
  for (int n = t; n < topk; n += kCarriedThreads) {
    int rank = -1;
    if (positions[n] >= 0 && count > 0) {
      const float u = slot_scores[n];
      rank = partition_point(0, count, [&](int r) { return scores[r] > u; });
      const int ties_end = partition_point(rank, count, [&](int r) { return scores[r] >= u; });
      if (ties_end - rank > 1) {
#pragma unroll 1
        for (int other = 0; other < topk; ++other) {
          rank += slot_scores[other] == u && positions[other] >= 0 && positions[other] < positions[n];
        }
      }
      rank = min(rank, min(count, topk) - 1);
      slot_of_rank[rank] = n;
    }
    rank_of_slot[n] = rank;
  }
}

// One CTA per stretch and lane, and one more per lane.
__global__ void __launch_bounds__(kCarriedThreads) carried_begin_kernel(const __grid_constant__ CarriedProblem p) {
  const int index = blockIdx.x % (p.stretches + 1), lane = blockIdx.x / (p.stretches + 1);
  if (index < p.stretches) {
    sort_stretch(p, lane, index);
  } else {
    carry_pool(p, lane);
  }
}

// One CTA per lane: what a prefix dropped no longer prefix wants back, so each pool comes from the one before it.
__global__ void __launch_bounds__(kStretch) carried_merge_kernel(const __grid_constant__ CarriedProblem p) {
  __shared__ uint64_t arrivals[kStretch];
  const int lane = blockIdx.x, t = threadIdx.x;
  int count = p.pool_counts[p.pool(lane, 0)];
#pragma unroll 1
  for (int index = 0; index < p.stretches; ++index) {
    const uint64_t* from = p.pools + p.pool(lane, index) * p.limit;
    uint64_t* to = p.pools + p.pool(lane, index + 1) * p.limit;
    const uint64_t own = p.sorted[p.stretch(lane, index) * kStretch + t];
    arrivals[t] = own;
    const int num_arrivals = __syncthreads_count(own != kNoKey);
#pragma unroll 1
    for (int n = t; n < count; n += kStretch) {
      const uint64_t key = from[n];
      const int place = n + partition_point(0, num_arrivals, [&](int m) { return arrivals[m] < key; });
      if (place < p.limit) to[place] = key;
    }
    if (own != kNoKey) {
      const int place = t + partition_point(0, count, [&](int m) { return from[m] < own; });
      if (place < p.limit) to[place] = own;
    }
    count = min(count + num_arrivals, p.limit);
    if (t == 0) p.pool_counts[p.pool(lane, index + 1)] = count;
    __syncthreads();
  }
}

}  // namespace sparsek::cuda::selection
