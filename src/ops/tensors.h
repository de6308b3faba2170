// Small helpers the operations' files share: empty tensors of possibly symbolic shape and the meta registration.
#pragma once
#include <ATen/ops/empty.h>
#include <c10/core/SymIntArrayRef.h>

#include <initializer_list>

#include "ops/dispatch.h"

namespace sparsek::ops {

inline Tensor empty_of(std::initializer_list<c10::SymInt> sizes, const at::TensorOptions& options) {
  return at::empty_symint(c10::SymIntArrayRef(sizes.begin(), sizes.size()), options);
}
inline Tensor int32_of(std::initializer_list<c10::SymInt> sizes, const Tensor& like) {
  return empty_of(sizes, like.options().dtype(at::kInt));
}
inline Tensor int64_of(std::initializer_list<c10::SymInt> sizes, const Tensor& like) {
  return empty_of(sizes, like.options().dtype(at::kLong));
}
inline const int32_t* int32_data(const Tensor& tensor) {
  return tensor.const_data_ptr<int32_t>();
}

}  // namespace sparsek::ops
