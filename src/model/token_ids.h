// Token ids as the int32 tensor a model reads, without a copy: the ids must outlive it.
#pragma once
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <span>

namespace sparsek::model {

inline at::Tensor as_tensor(std::span<const int32_t> ids) {
  return at::from_blob(const_cast<int32_t*>(ids.data()), {static_cast<int64_t>(ids.size())},
                       at::TensorOptions().dtype(at::kInt));
}

}  // namespace sparsek::model
