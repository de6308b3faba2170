// Launching a kernel with more shared memory than the 48 KB that are given unasked.
#pragma once
#include "kernels/cuda/portable/problem.h"
#include "kernels/cuda/shared_memory.h"

namespace sparsek::cuda::portable {

template <class Shared, class KernelFunction, class Params>
void launch(KernelFunction kernel, int64_t ctas, const Params& params, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= kPortableSharedBytes);
  allow_shared_bytes(kernel, sizeof(Shared));
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(ctas), kThreads, sizeof(Shared), stream>>>(params);
}

}  // namespace sparsek::cuda::portable
