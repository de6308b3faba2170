// The forward kernel's launcher, one file per head size because each takes long to compile.
#pragma once
#include "kernels/cuda/sm90/attention_fwd/tiles.cuh"

namespace sparsek::cuda::sm90 {

template <class Shape>
void launch_forward(const FwdParams& p, cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
