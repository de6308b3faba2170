// The Hopper set of attention's kernels; kernels/cuda/attention.h chooses between it and the portable one. Eq. 7-9 and
// section 5 of docs/math.md, head_dim 64 or 128, bfloat16 or float16; scores, tau, softmax_lse and dscores float32.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda::sm90 {

// Queries per list of far rows that these kernels want, for a group of num_heads / num_kv_heads query heads (at most
// 64).
int attention_chunk(int group);
// The most far rows that a query may see (topk + num_sinks): forward without far rotary; backward or with far rotary.
int attention_max_far(int group, bool forward_only);

// Whether these kernels serve a call on a device of compute capability 9.0.
bool serves_forward(const AttentionFwdParams& params, const LiveLists& live);
bool serves_backward(const AttentionBwdParams& params, const LiveLists& live);

// `live`: as select makes it. Rows of a batch row's K and V are 16-byte aligned. A NaN in tau makes its rows NaN.
void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream);

// dk and dv are not bit-identical from run to run (the order in which far keys add), nor are dq and dscores with q_far:
// `deterministic` must be false. dscores null: not wanted. The workspace may hold anything.
int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live);
void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
