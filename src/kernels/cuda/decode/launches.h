// Instances of decode_step's launches, one file each.
#pragma once
#include "kernels/cuda/decode/problem.cuh"

namespace sparsek::cuda::decode {

template <int kDim>
void launch(const Problem& p, cudaStream_t stream);
extern template void launch<64>(const Problem& p, cudaStream_t stream);
extern template void launch<128>(const Problem& p, cudaStream_t stream);

}  // namespace sparsek::cuda::decode
