#include "kernels/cuda/sm90/attention_bwd/launch.cuh"

namespace sparsek::cuda::sm90 {
SPARSEK_INSTANTIATE(launch_dkv, BwdParams, 128);
SPARSEK_INSTANTIATE(launch_prepare, PrepareParams, 128);
}  // namespace sparsek::cuda::sm90
