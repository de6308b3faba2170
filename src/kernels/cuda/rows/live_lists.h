// The lists of far rows (kernels/cuda/live_rows.h) of any rows: what `select` writes for whole sequences.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda {

// Reads far_begin, far_end, scores and tau of `params` (float32), nothing of q, k and v, and writes lists of `chunk`
// queries each: attention_chunk(group). Rows in a class lie in ascending order. In no order of the rows is a result
// wrong; far_begin that does not decrease is only faster. A list that overflows its capacity is cut off: rows as
// `select` and `select_chunk` leave them never do. The workspace may hold anything.
int64_t live_lists_workspace_bytes(const AttentionFwdParams& params, int chunk);
void live_lists(const AttentionFwdParams& params, int chunk, const LiveLists& lists, void* workspace,
                cudaStream_t stream);

}  // namespace sparsek::cuda
