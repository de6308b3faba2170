// Where a model's tensors live, and which operations compute on them.
#pragma once
#include <ATen/core/Tensor.h>

namespace sparsek::model {

struct Placement {
  at::ScalarType dtype = at::kBFloat16;  // of activations, states and plain weights
  at::Device device = at::kCPU;
  // Weights as plain tensors and torch's own operations around attention (ops/plain_ops.h): always, where the device is
  // not the CPU.
  bool plain = false;

  at::TensorOptions options() const { return at::TensorOptions().dtype(dtype).device(device); }
  at::TensorOptions options(at::ScalarType other) const { return options().dtype(other); }
};

}  // namespace sparsek::model
