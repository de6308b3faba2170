#include "kernels/cuda/portable/attention_bwd/key_kernel.cuh"

namespace sparsek::cuda::portable {

template void launch_key_gradient<__half>(const BwdProblem& problem, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
