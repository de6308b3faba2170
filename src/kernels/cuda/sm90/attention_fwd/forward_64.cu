#include "kernels/cuda/sm90/attention_fwd/launch.cuh"

namespace sparsek::cuda::sm90 {
SPARSEK_INSTANTIATE(launch_forward, FwdParams, 64);
}  // namespace sparsek::cuda::sm90
