// sparsek: eq. 2 on the last dimension, with the gradient of its Jacobian: dz_b = dp_b - mean of dp over F for b in F =
// {0 < p < 1}, otherwise 0.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/cpu/select/select.h"
#include "ops/checks.h"
#include "ops/once_differentiable.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& z, int64_t k) {
  TORCH_CHECK_VALUE(z.dim() >= 1, "z must be [..., columns], got a scalar");
  TORCH_CHECK_TYPE(z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble, "z must be Float or Double, got ",
                   z.scalar_type());
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1, got ", k);
}

Tensor sparsek_meta(const Tensor& z, int64_t k) {
  check(z, k);
  return at::empty_symint(z.sym_sizes(), z.options());
}

Tensor sparsek_cpu(const Tensor& z, int64_t k) {
  check(z, k);
  const Tensor p = at::empty(z.sizes(), z.options());
  if (z.numel() == 0) return p;
  const Tensor values = z.contiguous();
  const int64_t columns = z.size(-1), rows = z.numel() / columns;
  const Tensor tau = at::empty({rows}, z.options());
  cpu::sparsek({dtype_of(z), values.const_data_ptr(), p.data_ptr(), tau.data_ptr(), rows, columns, k});
  return p;
}

Tensor sparsek_backward(const Tensor& dp, const Tensor& p) {
  const Tensor fractional = p.gt(0).logical_and(p.lt(1));
  const Tensor inside = at::where(fractional, dp, 0);
  const Tensor mean = inside.sum(-1, /*keepdim=*/true, at::kDouble) / fractional.sum(-1, /*keepdim=*/true).clamp_min(1);
  return at::where(fractional, dp - mean.to(dp.scalar_type()), 0);
}

Tensor call_backward(const Tensor& dp, const Tensor& p) {
  static const auto operation = find_operation<decltype(sparsek_backward)>("sparsek::sparsek_backward");
  return operation.call(dp, p);
}

Tensor backward_autograd(const Tensor& dp, const Tensor& p) {
  const std::vector<Tensor> differentiable = {dp, p};
  return RefuseSecondDerivative::apply(at::TensorList(differentiable), "sparsek_backward",
                                       [&]() -> variable_list { return {call_backward(dp, p)}; })[0];
}

struct SparsekFunction : torch::autograd::Function<SparsekFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z, int64_t k) {
    const BelowAutograd below;
    static const auto operation = find_operation<decltype(sparsek_cpu)>("sparsek::sparsek");
    const Tensor p = operation.call(z, k);
    ctx->save_for_backward({p});
    return p;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {call_backward(grads[0], ctx->get_saved_variables()[0]), {}};
  }
};

Tensor sparsek_autograd(const Tensor& z, int64_t k) {
  return SparsekFunction::apply(z, k);
}

}  // namespace

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("sparsek", sparsek_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("sparsek", sparsek_meta);
}
TORCH_LIBRARY_IMPL(sparsek, CompositeExplicitAutograd, m) {
  m.impl("sparsek_backward", sparsek_backward);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("sparsek", sparsek_autograd);
  m.impl("sparsek_backward", backward_autograd);
}

}  // namespace sparsek::ops
