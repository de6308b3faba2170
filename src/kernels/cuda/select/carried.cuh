// Selection of a chunk of queries behind a carried state: what its kernels share (select_chunk.cu).
//
// A lane is one KV head of one batch row. Keys have identities in the order of their positions: carried pool entry r is
// key r, the candidate of query t is key pool_capacity + t. A rank key (score, identity) is one integer that ascends
// where ranks fall, so lists by rank are ascending and every comparison of ranks is one of integers.
#pragma once
#include <cstdint>

#include "kernels/cuda/select/problem.cuh"
#include "kernels/params.h"

namespace sparsek::cuda::selection {

constexpr uint64_t kNoKey = UINT64_MAX;  // ranks behind every key
constexpr int kStretch = 1024;           // queries between two pools that are kept
constexpr int kPiece = 32;               // queries that one CTA finds thresholds for: a lane of a warp each

struct CarriedProblem {
  SelectChunkParams params;
  uint64_t* sorted;       // [lanes, stretches, kStretch] candidates by rank, then kNoKey
  int32_t* first_bad;     // [lanes, stretches] first query whose candidate's score is not finite, or INT32_MAX
  uint64_t* pools;        // [lanes, stretches + 1, limit] the best `limit` keys before each stretch, and at the end
  int32_t* pool_counts;   // [lanes, stretches + 1]
  int32_t* slot_of_rank;  // [lanes, topk]
  int32_t* rank_of_slot;  // [lanes, topk]
  uint64_t *kth, *edge;  // [lanes, chunk] the topk-th and the pool_size-th key at a query, kNoKey while there are fewer
  float* tau;            // [lanes, chunk] not yet monotone; then monotone
  int32_t* num_support;  // [lanes] of the last query
  uint64_t* lists;       // scratch of query_kernel's CTAs where a pool outgrows shared memory
  int32_t lanes, stretches, limit, pieces;

  __device__ int64_t stretch(int lane, int index) const { return int64_t{lane} * stretches + index; }
  __device__ int64_t pool(int lane, int index) const { return int64_t{lane} * (stretches + 1) + index; }
  __device__ int64_t length(int lane) const { return params.lengths[lane / params.num_kv_heads]; }
  // The query at which the first key becomes a candidate, at most `chunk`.
  __device__ int first_query(int lane) const {
    const int64_t query = int64_t{params.num_sinks} + params.window_size - length(lane);
    return static_cast<int>(min(max(query, int64_t{0}), int64_t{params.chunk}));
  }
  __device__ float candidate(int lane, int query) const {
    const int b = lane / params.num_kv_heads, h = lane % params.num_kv_heads;
    return static_cast<const float*>(
        params.candidate_scores)[b * params.scores_strides.batch + query * params.scores_strides.seq +
                                 h * params.scores_strides.head];
  }
  __device__ const float* pool_scores(int lane) const {
    return static_cast<const float*>(params.pool_scores) + int64_t{lane} * params.pool_capacity;
  }
  // Carried keys in use: what the length says, or with an unlimited pool what is not -inf. A pool that begins with
  // something else than a number is poisoned.
  __device__ int num_carried(int lane) const {
    const int64_t candidates = length(lane) - params.window_size - params.num_sinks;
    const int most = static_cast<int>(min(max(candidates, int64_t{0}), int64_t{params.pool_capacity}));
    if (params.pool_size > 0 || most == 0) return most;
    const float* scores = pool_scores(lane);
    return max(1, partition_point(0, most, [&](int n) { return scores[n] > -INFINITY; }));
  }
  __device__ bool is_poisoned(int lane) const { return num_carried(lane) > 0 && !isfinite(pool_scores(lane)[0]); }
};

// A score that is not finite ranks first, so that it never leaves the pool and whoever selects next meets it.
__device__ __forceinline__ uint64_t rank_key(float u, int identity) {
  return pool_key(isfinite(u) ? descending_bits(u) : 0, identity);
}
__device__ __forceinline__ float score_of(uint64_t key) {
  return pool_score(key);
}
__device__ __forceinline__ int identity_of(uint64_t key) {
  return static_cast<int>(key & 0xffffffffu);
}

}  // namespace sparsek::cuda::selection
