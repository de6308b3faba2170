// The two passes of window_mass on Hopper.
#pragma once
#include <cuda_runtime_api.h>

#include "base/dtype.h"

namespace sparsek::cuda::mass {

struct Problem;

namespace sm90 {

// What window_mass.cu does on other devices, with the same problem.
void run(const Problem& problem, DType dtype, int head_dim, cudaStream_t stream);

}  // namespace sm90
}  // namespace sparsek::cuda::mass
