// Device memory for tests: filled with 0xff (NaN, -1) and guarded on both sides.
#pragma once
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "kernels/cuda/launch.h"

namespace sparsek::test {

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
#define SKIP_WITHOUT_DEVICE() \
  if (!has_device()) GTEST_SKIP() << "no CUDA device here"

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    cuda::check_cuda(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes() + 2 * kGuardBytes), "cudaMalloc");
    cuda::check_cuda(cudaMemset(memory_, 0xff, bytes() + 2 * kGuardBytes), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    if (count_ > 0) cuda::check_cuda(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() {
    EXPECT_TRUE(guards_intact());
    cudaFree(memory_);
  }

  T* data() const { return reinterpret_cast<T*>(memory_ + kGuardBytes); }
  std::vector<T> to_vector() const {
    std::vector<T> values(count_);
    if (count_ > 0) cuda::check_cuda(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  static constexpr size_t kGuardBytes = 512;
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  bool guards_intact() const {
    uint8_t guard[kGuardBytes], expected[kGuardBytes];
    std::memset(expected, 0xff, kGuardBytes);
    for (const uint8_t* at : {memory_, memory_ + kGuardBytes + bytes()}) {
      if (cudaMemcpy(guard, at, kGuardBytes, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
      if (std::memcmp(guard, expected, kGuardBytes) != 0) return false;
    }
    return true;
  }

  int64_t count_;
  uint8_t* memory_ = nullptr;
};

}  // namespace sparsek::test
