// One token per batch row on the GPU, the state changed in place (docs/math.md section 6).
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace sparsek::cuda {

// What the token does to a (batch row, KV head) besides taking its place in the ring.
struct DecodePlan {
  int64_t length;      // tokens read before this one
  float candidate;     // its score
  float tau;           // behind it; -inf where every weight is 1, also with Gate::kHard
  int32_t new_row;     // of the ring, that the token takes
  int32_t rank;        // of the candidate in the pool, -1: it does not join
  int32_t slot;        // that the candidate takes, -1: none
  int32_t num_pooled;  // with the candidate
  int32_t poisoned;    // a score is not finite: so is the output from now on
};

// All pointers on the device; dtype bfloat16 or float16, head_dim 64 or 128, at most 64 query heads a KV head. Rows of
// q, k, v (and far) are 16-byte aligned. Two launches that depend on shapes alone, no host synchronisation; lengths
// stay on the device. A candidate's score that is not finite makes that KV head's outputs NaN from this step on
// (pool_scores begins with NaN then); every index stays in range. The state must be one that its lengths say
// (docs/math.md section 6); empty slots may hold anything. The workspace may hold anything; afterwards it begins with
// the step's plans, [batch, num_kv_heads].
int64_t decode_step_workspace_bytes(const DecodeStepParams& params);
void decode_step(const DecodeStepParams& params, void* workspace, cudaStream_t stream);

// How many parts each (batch row, KV head)'s rows are cut into, and tiles of 16 rows in each (in whole steps of a CTA).
struct DecodeSplits {
  int count, tiles;
};
DecodeSplits decode_splits(int64_t ctas_per_split, int num_tiles, int resident_ctas);

}  // namespace sparsek::cuda
