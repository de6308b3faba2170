// Shared memory of a block: what devices have, and how a kernel gets more than the 48 KB that are given unasked.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

#include "kernels/cuda/launch.h"

namespace sparsek::cuda {

// Every device of compute capability 8.0 or later gives a block this much; 8.6, 8.9 and 12.0 no more (8.0: 163 KB, 9.0
// and 10.0: 227 KB). Kernels that run everywhere stay within it or choose their size by max_shared_bytes().
constexpr int kPortableSharedBytes = 99 * 1024;

// Of the current device.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Before a launch with this much dynamic shared memory. Refuses what the current device does not have.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, int64_t bytes) {
  const auto* const function = reinterpret_cast<const void*>(kernel);
  if (bytes > kPortableSharedBytes && bytes > max_shared_bytes()) {
    const char* name = "a kernel";
    cudaFuncGetName(&name, function);
    throw std::runtime_error(std::string("CUDA: ") + name + " needs " + std::to_string(bytes) +
                             " bytes of shared memory a block, this device has " + std::to_string(max_shared_bytes()) +
                             ": run it on a device with as much");
  }
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "cudaFuncSetAttribute");
}

}  // namespace sparsek::cuda
