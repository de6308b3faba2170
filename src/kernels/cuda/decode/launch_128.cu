#include "kernels/cuda/decode/launch.cuh"

namespace sparsek::cuda::decode {

template void launch<128>(const Problem& p, cudaStream_t stream);

}  // namespace sparsek::cuda::decode
