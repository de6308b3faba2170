// Memory on the GPU for the timing programs, which never free it: they end soon.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/launch.h"

namespace sparsek {

template <class T>
T* device(int64_t count) {
  void* memory = nullptr;
  cuda::check_cuda(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}
template <class T>
T* device(const std::vector<T>& block, int64_t count) {  // repeated to `count`
  T* const data = device<T>(count);
  for (int64_t at = 0; at < count; at += std::ssize(block)) {
    cuda::check_cuda(cudaMemcpy(data + at, block.data(), std::min<int64_t>(std::ssize(block), count - at) * sizeof(T),
                                cudaMemcpyHostToDevice),
                     "cudaMemcpy");
  }
  return data;
}
template <class T>
T* device(const std::vector<T>& values) {
  return device(values, std::ssize(values));
}

}  // namespace sparsek
