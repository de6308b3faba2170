#include "kernels/cuda/sm90/attention_bwd/launch.cuh"

namespace sparsek::cuda::sm90 {
SPARSEK_INSTANTIATE(launch_dkv, BwdParams, 64);
SPARSEK_INSTANTIATE(launch_prepare, PrepareParams, 64);
}  // namespace sparsek::cuda::sm90
