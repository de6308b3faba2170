// Selection on the GPU: eq. 3-6 of docs/math.md for whole sequences, and with it the rows and lists that attention
// reads.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda {

// What attention reads beside tau (kernels/params.h "Rows", nothing carried). Null members are not wanted.
struct SelectRows {
  float* row_scores = nullptr;      // [batch, num_kv_heads, seqlen]  +inf for sinks
  int32_t* far_begin = nullptr;     // [batch, num_kv_heads, seqlen]
  int32_t* far_end = nullptr;       // [batch, num_kv_heads, seqlen]
  int32_t* window_begin = nullptr;  // [batch, seqlen]
  LiveLists live = {};              // rows null: not wanted
};

// All pointers on the device; dtype float32. No host synchronisation; the launches depend on shapes alone. Scores that
// are not finite make tau NaN from their position to their document's end; every index stays in range. `chunk`: queries
// per list of far rows, at most 1,024. The workspace may hold anything.
int64_t select_workspace_bytes(const SelectParams& params, int chunk);
void select(const SelectParams& params, const SelectRows& rows, int chunk, void* workspace, cudaStream_t stream);

}  // namespace sparsek::cuda
