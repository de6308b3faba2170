// The two halves of the backward's launcher, compiled apart because each takes long.
#pragma once
#include "kernels/cuda/sm90/attention_bwd/kernel.cuh"

namespace sparsek::cuda::sm90 {

// dk, dv (and, with far rotary, dq and dq_far into their scratch).
void launch_bwd(const BwdParams& p, bool soft, cudaStream_t stream);
void launch_bwd_far(const BwdParams& p, bool soft, cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
