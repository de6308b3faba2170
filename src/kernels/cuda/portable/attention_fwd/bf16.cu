#include "kernels/cuda/portable/attention_fwd/kernel.cuh"

namespace sparsek::cuda::portable {

template void launch_forward<__nv_bfloat16>(const Problem& problem, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
