// What a token's candidate does to the pool and the slots of a unit (eq. 3-6), and tau behind it; nothing is changed
// yet. One CTA.
#pragma once
#include <climits>
#include <cstdint>

#include "kernels/cuda/decode/threshold.cuh"

namespace sparsek::cuda::decode {

struct PlanShared {
  PoolShared pool;
  uint32_t weakest;             // score of the weakest slot, as ascending bits
  unsigned long long youngest;  // position + 1 among its equals
  int slot;
};

// Unsigned integers in the order of the scores; -0.0 is +0.0.
__device__ __forceinline__ uint32_t ascending_bits(float u) {
  const uint32_t bits = __float_as_uint(u + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The slot that the candidate takes: the first empty one, else the one of the smallest score, among equals of the
// largest position. -1 only in a state that contradicts its length or holds scores that are not finite.
__device__ inline int find_slot(const Problem& p, int unit, bool full, PlanShared& s) {
  const int t = threadIdx.x, topk = p.params.topk;
  const int64_t* positions = p.slot_positions(unit);
  if (!full) {
#pragma unroll 1
    for (int n = t; n < topk; n += kThreads) {
      if (positions[n] >= 0) continue;
      atomicMin(&s.slot, n);
      break;
    }
    __syncthreads();
    return s.slot == INT_MAX ? -1 : s.slot;
  }
  const float* scores = p.slot_scores(unit);
  uint32_t least = UINT32_MAX;
#pragma unroll 4
  for (int n = t; n < topk; n += kThreads) least = min(least, ascending_bits(scores[n]));
  least = __reduce_min_sync(0xffffffffu, least);
  if ((t & 31) == 0) atomicMin(&s.weakest, least);
  __syncthreads();
  least = s.weakest;
#pragma unroll 4
  for (int n = t; n < topk; n += kThreads) {
    if (ascending_bits(scores[n]) == least) atomicMax(&s.youngest, static_cast<unsigned long long>(positions[n] + 1));
  }
  __syncthreads();
#pragma unroll 4
  for (int n = t; n < topk; n += kThreads) {
    if (ascending_bits(scores[n]) == least && static_cast<unsigned long long>(positions[n] + 1) == s.youngest) {
      atomicMin(&s.slot, n);
    }
  }
  __syncthreads();
  return s.slot == INT_MAX ? -1 : s.slot;
}

// What the plan needs of memory: asked for early.
struct PlanInputs {
  int64_t length;
  int new_row;
  float candidate;
  float pool[SortedPool::kEach];  // the first scores, as SortedPool takes them
};

// All threads get the same.
__device__ inline Plan make_plan(const Problem& p, int unit, const PlanInputs& in, PlanShared& s) {
  const DecodeStepParams& params = p.params;
  const float* scores = p.pool(unit);
  if (threadIdx.x == 0) s.weakest = UINT32_MAX, s.youngest = 0, s.slot = INT_MAX;
  Plan plan;
  plan.length = in.length;
  plan.new_row = in.new_row;
  const int64_t candidates = in.length - params.window_size - params.num_sinks;  // before this token
  const bool has_candidate = candidates >= 0;
  plan.candidate = has_candidate ? in.candidate : 0.0f;
  plan.num_pooled = static_cast<int32_t>(min(max(candidates, int64_t{0}), int64_t{params.pool_size}));
  plan.rank = plan.slot = -1;
  plan.tau = -INFINITY;
  SortedPool pool(s.pool, scores, plan.num_pooled, in.pool);
  const bool gated = params.gate == Gate::kSoft && plan.num_pooled + has_candidate > params.topk;
  if (gated) pool.make_prefix(params.topk);
  plan.poisoned = (plan.num_pooled > 0 && !isfinite(pool.cached(0))) || !isfinite(plan.candidate);
  const bool full = plan.num_pooled >= params.topk;
  int kept = plan.num_pooled;
  if (has_candidate) {  // it is the youngest: behind every equal score
    const int rank = pool.count_while([&](float x) { return x >= plan.candidate; });
    if (rank < params.pool_size) {
      plan.rank = rank;
      kept = min(kept, params.pool_size - 1);
      plan.num_pooled = kept + 1;
      if (rank < params.topk) plan.slot = find_slot(p, unit, full, s);
    }
  }
  if (plan.poisoned) {
    plan.tau = NAN;
  } else if (gated && plan.num_pooled > params.topk) {
    plan.tau = threshold(pool, kept, plan.rank, plan.candidate, params.topk);
  }
  return plan;
}

}  // namespace sparsek::cuda::decode
