// Activation checkpointing: a function whose intermediate results are not kept for the backward pass but computed
// again. torch has it in Python only.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace sparsek::train {

using Tensors = std::vector<at::Tensor>;
using TensorFunction = std::function<Tensors(const Tensors&)>;

// function(inputs), with gradients to the inputs alone: whatever else it reads must not need one. It has to compute the
// same numbers every time, and must not change its inputs. Outputs of integer type carry no gradient.
Tensors recompute(const TensorFunction& function, const Tensors& inputs);

}  // namespace sparsek::train
