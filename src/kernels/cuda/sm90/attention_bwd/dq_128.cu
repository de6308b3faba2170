#include "kernels/cuda/sm90/attention_bwd/launch.cuh"

namespace sparsek::cuda::sm90 {
SPARSEK_INSTANTIATE(launch_dq, DqParams, 128);
}  // namespace sparsek::cuda::sm90
