// From a selection to the row arrays that attention reads, on the GPU (kernels/params.h, "Rows").
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace sparsek::cuda {

// Pointers on the device. Results equal those of kernels/cpu/select/{visibility,chunk_visibility}.h; cu_seqlens,
// lengths and sources, which nobody checked, are clamped so that every index stays in range.
void visibility(const VisibilityParams& params, cudaStream_t stream);
void chunk_visibility(const ChunkVisibilityParams& params, cudaStream_t stream);
void window_rows(const WindowRowsParams& params, cudaStream_t stream);

}  // namespace sparsek::cuda
