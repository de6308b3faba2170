// What runs before the gradients of the portable backward.
#pragma once
#include "kernels/cuda/portable/problem.h"

namespace sparsek::cuda::portable {

// Fills lse2, delta and blocks_before, and zeroes dk_sum and dv_sum where a row is ever far.
void launch_around(const BwdProblem& problem, const float* dlse, int32_t* blocks_before, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
