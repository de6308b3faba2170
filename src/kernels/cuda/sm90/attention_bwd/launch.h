// The launchers of the backward's kernels, compiled apart because each takes long.
#pragma once
#include "kernels/cuda/sm90/attention_bwd/dq_kernel.cuh"
#include "kernels/cuda/sm90/attention_bwd/prepare.cuh"

namespace sparsek::cuda::sm90 {

template <class Shape>
void launch_prepare(const PrepareParams& p, cudaStream_t stream);
// dk, dv and dk_far.
template <class Shape>
void launch_dkv(const BwdParams& p, cudaStream_t stream);
// dq and dq_far; directly behind launch_dkv.
template <class Shape>
void launch_dq(const DqParams& p, cudaStream_t stream);

}  // namespace sparsek::cuda::sm90
