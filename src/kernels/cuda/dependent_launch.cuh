// Launches that may overlap the end of the kernel before them in the stream, on compute capability 9.0. Elsewhere they
// are plain launches: later devices too run code of compute capability 8.0, which waits for nothing.
//
// A kernel launched by launch_behind calls wait_for_previous_kernel() before it reads what earlier kernels wrote or
// writes what they read: it returns when the kernel before it has ended. That one waited likewise, so everything
// earlier has ended too; hence every kernel launched this way must wait. let_next_kernel_start() allows the next one's
// CTAs onto multiprocessors that this one leaves free.
#pragma once
#include <cuda_runtime.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/cuda/shared_memory.h"

namespace sparsek::cuda {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class... Params, class... Arguments>
void launch_behind(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) allow_shared_bytes(kernel, static_cast<int64_t>(shared_bytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = compute_capability() == 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(arguments)...), "cudaLaunchKernelEx");
}

}  // namespace sparsek::cuda
