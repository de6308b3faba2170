#include "train/recompute.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace sparsek::train {
namespace {

using torch::autograd::AutogradContext;

struct FunctionHolder : torch::CustomClassHolder {
  explicit FunctionHolder(TensorFunction function) : function(std::move(function)) {}
  TensorFunction function;
};

struct Recompute : torch::autograd::Function<Recompute> {
  static Tensors forward(AutogradContext* ctx, at::TensorList inputs, const TensorFunction& function) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(inputs.vec());
    ctx->saved_data["function"] = c10::IValue::make_capsule(c10::make_intrusive<FunctionHolder>(function));
    Tensors outputs;
    {
      const at::NoGradGuard no_grad;
      outputs = function(inputs.vec());
    }
    Tensors constant;
    for (const at::Tensor& output : outputs) {
      if (!output.is_floating_point()) constant.push_back(output);
    }
    ctx->mark_non_differentiable(constant);
    return outputs;
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& gradients) {
    const auto& holder = *static_cast<FunctionHolder*>(ctx->saved_data["function"].toCapsule().get());
    Tensors inputs, wanted;
    for (const at::Tensor& saved : ctx->get_saved_variables()) {
      inputs.push_back(saved.detach());
      if (saved.requires_grad()) {
        inputs.back().set_requires_grad(true);
        wanted.push_back(inputs.back());
      }
    }
    Tensors outputs, output_gradients;
    {
      const at::AutoGradMode with_grad(true);
      const Tensors all = holder.function(inputs);
      for (size_t i = 0; i < all.size(); ++i) {
        if (!gradients[i].defined() || !all[i].requires_grad()) continue;
        outputs.push_back(all[i]);
        output_gradients.push_back(gradients[i]);
      }
    }
    Tensors found(wanted.size());
    if (!outputs.empty()) {
      found = torch::autograd::grad(outputs, wanted, output_gradients, /*retain_graph=*/false, /*create_graph=*/false,
                                    /*allow_unused=*/true);
    }
    Tensors result;
    size_t next = 0;
    for (const at::Tensor& input : inputs) result.push_back(input.requires_grad() ? found[next++] : at::Tensor());
    result.emplace_back();  // of `function`
    return result;
  }
};

}  // namespace

Tensors recompute(const TensorFunction& function, const Tensors& inputs) {
  return Recompute::apply(at::TensorList(inputs), function);
}

}  // namespace sparsek::train
