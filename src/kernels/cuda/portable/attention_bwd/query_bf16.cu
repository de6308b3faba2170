#include "kernels/cuda/portable/attention_bwd/query_kernel.cuh"

namespace sparsek::cuda::portable {

template void launch_query_gradient<__nv_bfloat16>(const BwdProblem& problem, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
