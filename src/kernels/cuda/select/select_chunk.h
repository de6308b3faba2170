// Selection of a chunk of queries behind a carried state on the GPU: eq. 3-6 and 12 of docs/math.md.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace sparsek::cuda {

// All pointers on the device; dtype float32. No host synchronisation; the launches depend on shapes alone. The state
// must be one that its lengths say (docs/math.md section 6). Scores that are not finite make tau NaN from their query
// on, also those carried; they stay at the top of the pool. Every index stays in range. The workspace may hold
// anything.
int64_t select_chunk_workspace_bytes(const SelectChunkParams& params);
void select_chunk(const SelectChunkParams& params, void* workspace, cudaStream_t stream);

}  // namespace sparsek::cuda
