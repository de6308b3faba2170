// What the CUDA implementations share: torch's stable ABI made short. This library sees torch only through
// torch/csrc/stable and the C functions below it, so that one build serves every torch from 2.10 on and needs no GPU
// (docs/decisions/torch-binding.md). Autograd, meta, autocast and the composites are src/ops's.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <tuple>

#include "kernels/params.h"

namespace sparsek::ops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool given(const MaybeTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

// A view of sizes that lives as long as the tensor.
inline std::span<const int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.data(), sizes.size()};
}

// A contiguous tensor on a device's memory, of the caching allocator, not written. Where there is no memory:
// std::runtime_error with the operation, the bytes wanted and the bytes there are. (Torch's own OutOfMemoryError does
// not come through the stable ABI.)
Tensor empty(std::span<const int64_t> sizes, ScalarType dtype, int32_t device);
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device) {
  return empty(std::span(sizes.begin(), sizes.size()), dtype, device);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes, dtype, like.get_device_index());
}
// Like another one in shape and device.
inline Tensor new_like(const Tensor& like, ScalarType dtype) {
  return empty(sizes_of(like), dtype, like.get_device_index());
}
inline Tensor new_like(const Tensor& like) {
  return new_like(like, like.scalar_type());
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data_or_null(const MaybeTensor& tensor) {
  return given(tensor) ? const_data<T>(*tensor) : nullptr;
}
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline MaybeTensor as_contiguous(const MaybeTensor& tensor) {
  return given(tensor) ? MaybeTensor(as_contiguous(*tensor)) : MaybeTensor();
}
inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Makes a tensor's device the current one for torch and for this library's CUDA runtime, and knows its current stream.
// Meanwhile errors name `operation`: the calling function.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor, const char* operation = __builtin_FUNCTION());
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice();
  cudaStream_t stream() const { return stream_; }
  // Scratch for the stream's next kernels; freed memory is used again in the stream's order.
  Tensor workspace(int64_t bytes) const;

 private:
  int32_t device_;
  const char* outer_operation_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace sparsek::ops::cuda

// An argument `str gate` as a Gate. (torch's own conversion to std::string loses the string's memory at every call.)
namespace torch::stable::detail {
template <>
struct ToImpl<sparsek::Gate> {
  static sparsek::Gate call(StableIValue value, uint64_t extension_build_version, bool is_internal);
};
}  // namespace torch::stable::detail
