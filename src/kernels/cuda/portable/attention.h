// The portable set of attention's kernels (kernels/cuda/attention.h chooses): eq. 7-9 and section 5 of docs/math.md by
// mma.sync and cp.async, compute capability 8.0 or later. bfloat16 or float16, head_dim 64 or 128, groups of at most 64
// query heads, any number of far rows; scores, tau, softmax_lse and dscores float32. Every result is bit-identical from
// run to run.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda::portable {

bool serves(DType dtype, int head_dim, int group);

void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream);
int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live);
void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
