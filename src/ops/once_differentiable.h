// A backward operation's Autograd kernel: it runs below autograd, and a gradient through its outputs (a second
// derivative) is an error that names the operation.
#pragma once
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <string>

#include "ops/dispatch.h"

namespace sparsek::ops {

struct RefuseSecondDerivative : torch::autograd::Function<RefuseSecondDerivative> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList inputs,
                                                const std::string& name,
                                                const std::function<torch::autograd::variable_list()>& compute) {
    ctx->saved_data["name"] = name;
    ctx->saved_data["num_inputs"] = static_cast<int64_t>(inputs.size());
    const BelowAutograd below;
    return compute();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "sparsek has no second derivatives: ", ctx->saved_data["name"].toStringRef(),
                                " cannot be differentiated");
  }
};

}  // namespace sparsek::ops
