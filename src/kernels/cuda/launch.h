// CUDA errors as exceptions, and what the launchers share.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sparsek::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

inline int num_multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

}  // namespace sparsek::cuda
