// eq. 1b of docs/math.md on the GPU: what the queries in the older half of its window paid a key.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/params.h"

namespace sparsek::cuda {

// bfloat16 or float16, head_dim 64 or 128, num_heads / num_kv_heads at most 64, rows of q and k 16-byte aligned; mass
// and mass_in float32. window_begin is clamped to [0, the query's own row]; rows that no query sees are not used
// (NaN too). Bit-identical from run to run of the same set of kernels. The workspace may hold anything. wgmma
// multiplies on compute capability 9.0, unless `choice` is kPortable; mma.sync elsewhere.
int64_t window_mass_workspace_bytes(const WindowMassParams& params);
void window_mass(const WindowMassParams& params, void* workspace, cudaStream_t stream,
                 KernelChoice choice = KernelChoice::kAutomatic);

}  // namespace sparsek::cuda
