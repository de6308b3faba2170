// Scores on the GPU: eq. 1 of docs/math.md and the score gradient, eq. 11.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace sparsek::cuda {

// eq. 11 from the sums of eq. 10, O(rows + queries). Contiguous; rows as in AttentionBwdParams:
// [ num_pool_rows without keys | seqlen_k ].
struct ScoreGradientParams {
  const float* h_key;         // [lanes, seqlen_k]  sum of h over the queries at which the key is fractional
  const float* h_query;       // [lanes, seqlen_q]  sum of h over the query's fractional keys
  const int32_t* frac_begin;  // [lanes, num_pool_rows + seqlen_k]  as select makes them
  const int32_t* frac_end;
  float* dscores;                                    // [lanes, num_pool_rows + seqlen_k]
  int32_t lanes, seqlen_q, seqlen_k, num_pool_rows;  // lanes: batch * num_kv_heads
};
// Bit-identical from run to run. The workspace may hold anything.
int64_t score_gradient_workspace_bytes(const ScoreGradientParams& params);
void score_gradient(const ScoreGradientParams& params, void* workspace, cudaStream_t stream);

// Pointers on the device; dtype float32; cu_seqlens with batch 1 only. stats: the last document's, as on the CPU. The
// workspace may hold anything.
int64_t normalise_scores_workspace_bytes(const NormaliseParams& params);
void normalise_scores(const NormaliseParams& params, void* workspace, cudaStream_t stream);

// Gradients through the running statistics, in double, as on the CPU: fwd's outputs are not read. Bit-identical from
// run to run. The workspace may hold anything.
int64_t normalise_scores_backward_workspace_bytes(const NormaliseBwdParams& params);
void normalise_scores_backward(const NormaliseBwdParams& params, void* workspace, cudaStream_t stream);

}  // namespace sparsek::cuda
