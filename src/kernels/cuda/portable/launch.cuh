// Launching a kernel with more shared memory than the 48 KB that are given unasked.
#pragma once
#include "kernels/cuda/launch.h"
#include "kernels/cuda/portable/problem.h"

namespace sparsek::cuda::portable {

template <class Shared, class KernelFunction, class Params>
void launch(KernelFunction kernel, int64_t ctas, const Params& params, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
             "cudaFuncSetAttribute");
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(ctas), kThreads, sizeof(Shared), stream>>>(params);
}

}  // namespace sparsek::cuda::portable
