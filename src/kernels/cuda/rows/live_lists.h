// The lists of far rows (kernels/cuda/live_rows.h) of any rows: what `select` writes for whole sequences.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda {

// Reads far_begin, far_end, scores and tau of `params` (float32), nothing of q, k and v, and writes lists of `chunk`
// queries each: attention_chunk(group). Rows in a class lie in ascending order. In no order of the rows is a result
// wrong; far_begin that does not decrease is only faster. The workspace may hold anything.
// A list that overflows its capacity is cut off: rows as `select` and `select_chunk` leave them never do. So that this
// is seen, `tau` [batch, num_kv_heads, seqlen_q] becomes params.tau (which it may be), and NaN at the queries of lists
// that were cut: attention on it makes their outputs and gradients NaN.
int64_t live_lists_workspace_bytes(const AttentionFwdParams& params, int chunk);
void live_lists(const AttentionFwdParams& params, int chunk, const LiveLists& lists, float* tau, void* workspace,
                cudaStream_t stream);

}  // namespace sparsek::cuda
