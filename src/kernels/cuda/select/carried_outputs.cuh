// The last two kernels of select_chunk: tau as it is given out; expiries, fractional intervals and the new state by
// binary searches in what never decreases along the queries (facts a and c).
#pragma once
#include "kernels/cuda/select/carried.cuh"

namespace sparsek::cuda::selection {

constexpr int kTauThreads = 1024, kOutputThreads = 256;

// One CTA per lane. Rounding must not make tau decrease; a score that is not finite makes it NaN from its query on.
__global__ void __launch_bounds__(kTauThreads) carried_tau_kernel(const __grid_constant__ CarriedProblem p) {
  __shared__ float warp_most[kTauThreads / 32];
  const int lane = blockIdx.x, t = threadIdx.x, chunk = p.params.chunk;
  float* tau = p.tau + int64_t{lane} * chunk;
  const int b = lane / p.params.num_kv_heads, h = lane % p.params.num_kv_heads;
  float* out = static_cast<float*>(p.params.tau) + b * p.params.tau_strides.batch + h * p.params.tau_strides.head;
  int bad = p.is_poisoned(lane) ? 0 : INT32_MAX;
#pragma unroll 1
  for (int index = 0; index < p.stretches; ++index) bad = min(bad, p.first_bad[p.stretch(lane, index)]);
  float before = -INFINITY;
#pragma unroll 1
  for (int base = 0; base < chunk; base += kTauThreads) {
    const int i = base + t;
    float most = i < chunk ? tau[i] : -INFINITY;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, most, step);
      if ((t & 31) >= step) most = fmaxf(most, other);
    }
    if ((t & 31) == 31) warp_most[t / 32] = most;
    __syncthreads();
    most = fmaxf(most, before);
#pragma unroll 1
    for (int w = 0; w < kTauThreads / 32; ++w) {
      if (w < t / 32) most = fmaxf(most, warp_most[w]);
      before = fmaxf(before, warp_most[w]);
    }
    if (i < chunk) {
      tau[i] = most;
      out[i * p.params.tau_strides.seq] = i >= bad ? NAN : most;
    }
    __syncthreads();
  }
}

struct CarriedOutputs {
  const CarriedProblem& p;
  const int lane;
  const float* tau;
  const uint64_t *kth, *edge;

  __device__ CarriedOutputs(const CarriedProblem& p, int lane)
      : p(p),
        lane(lane),
        tau(p.tau + int64_t{lane} * p.params.chunk),
        kth(p.kth + int64_t{lane} * p.params.chunk),
        edge(p.edge + int64_t{lane} * p.params.chunk) {}

  // First query from `from` on that does not select the key.
  __device__ int expiry(uint64_t key, int from) const {
    return partition_point(from, p.params.chunk, [&](int i) { return kth[i] >= key; });
  }
  struct Interval {
    int begin, end;
  };
  __device__ Interval fraction(uint64_t key, float u, int from, int otherwise) const {
    const int chunk = p.params.chunk;
    const int begin = partition_point(from, chunk, [&](int i) { return u - tau[i] >= 1.0f; });
    const int end = partition_point(begin, chunk, [&](int i) { return u - tau[i] > 0.0f && edge[i] >= key; });
    if (begin >= end) return {otherwise, otherwise};
    return {begin, end};
  }

  __device__ void write_slot(int slot) const {
    const int64_t at = int64_t{lane} * p.params.topk + slot;
    const int rank = p.rank_of_slot[at];
    int expires = 0;
    Interval interval{0, 0};
    if (rank >= 0) {
      const float u = p.pool_scores(lane)[rank];
      const uint64_t key = rank_key(u, rank);
      expires = expiry(key, 0);
      interval = fraction(key, u, 0, 0);
    }
    p.params.slot_expiry[at] = expires;
    p.params.slot_frac_begin[at] = interval.begin;
    p.params.slot_frac_end[at] = interval.end;
  }

  __device__ void write_pool(int rank) const {
    const int64_t at = int64_t{lane} * p.params.pool_capacity + rank;
    Interval interval{0, 0};
    if (rank >= p.params.topk && rank < p.pool_counts[p.pool(lane, 0)]) {
      const float u = p.pool_scores(lane)[rank];
      interval = fraction(rank_key(u, rank), u, 0, 0);
    }
    p.params.pool_frac_begin[at] = interval.begin;
    p.params.pool_frac_end[at] = interval.end;
  }

  __device__ void write_arrival(int query) const {
    const int64_t at = int64_t{lane} * p.params.chunk + query;
    int expires = query;
    Interval interval{query, query};
    if (query >= p.first_query(lane)) {
      const float u = p.candidate(lane, query);
      const uint64_t key = rank_key(u, p.params.pool_capacity + query);
      expires = expiry(key, query);
      interval = fraction(key, u, query, query);
    }
    p.params.arrival_expiry[at] = expires;
    p.params.arrival_frac_begin[at] = interval.begin;
    p.params.arrival_frac_end[at] = interval.end;
  }

  // Keys in the new pool; one without limit keeps what can still matter.
  __device__ int num_kept() const {
    const int count = p.pool_counts[p.pool(lane, p.stretches)];
    if (p.params.pool_size > 0 || count <= p.params.topk) return count;
    return min(count, max(p.num_support[lane], p.params.topk + 1));
  }
  __device__ uint64_t kept_key(int rank) const {
    return rank < num_kept() ? p.pools[p.pool(lane, p.stretches) * p.limit + rank] : kNoKey;
  }
  __device__ void write_new_pool(int rank) const {
    const uint64_t key = kept_key(rank);
    p.params.new_pool_source[int64_t{lane} * p.params.new_pool_capacity + rank] = key == kNoKey ? -1 : identity_of(key);
  }
  __device__ void write_new_slot(int rank) const {
    const int64_t row = int64_t{lane} * p.params.topk;
    const uint64_t key = kept_key(rank);
    int source = -1;
    int64_t position = -1;
    if (key != kNoKey && identity_of(key) >= p.params.pool_capacity) {
      const int query = identity_of(key) - p.params.pool_capacity;
      source = p.params.topk + query;
      position = p.length(lane) + query - p.params.window_size;
    } else if (key != kNoKey && identity_of(key) < p.params.topk) {
      source = p.slot_of_rank[row + identity_of(key)];
      if (source >= 0) position = p.params.slot_positions[row + source];
    }
    p.params.new_slot_source[row + rank] = source;
    p.params.new_slot_positions[row + rank] = position;
  }
};

__global__ void __launch_bounds__(kOutputThreads) carried_output_kernel(const __grid_constant__ CarriedProblem p) {
  const SelectChunkParams& params = p.params;
  const int64_t each = 2 * int64_t{params.topk} + params.pool_capacity + params.chunk + params.new_pool_capacity;
#pragma unroll 1
  for (int64_t item = int64_t{blockIdx.x} * kOutputThreads + threadIdx.x; item < p.lanes * each;
       item += int64_t{gridDim.x} * kOutputThreads) {
    const CarriedOutputs outputs(p, static_cast<int>(item / each));
    int64_t n = item % each;
    if (n < params.topk) {
      outputs.write_slot(static_cast<int>(n));
      continue;
    }
    n -= params.topk;
    if (n < params.topk) {
      outputs.write_new_slot(static_cast<int>(n));
      continue;
    }
    n -= params.topk;
    if (n < params.pool_capacity) {
      outputs.write_pool(static_cast<int>(n));
      continue;
    }
    n -= params.pool_capacity;
    if (n < params.chunk) {
      outputs.write_arrival(static_cast<int>(n));
      continue;
    }
    outputs.write_new_pool(static_cast<int>(n - params.chunk));
  }
}

}  // namespace sparsek::cuda::selection
