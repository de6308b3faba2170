// See layer_ops.h. Each operation is a composite of torch's own operations; on a GPU the composites give way to our
// kernels and their gradients.
#include "ops/layer_ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/dispatch.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

MaybeTensor maybe(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : MaybeTensor();
}

Tensor none(const Tensor& like) {
  return at::empty({0}, like.options());
}

// add_rms_norm.

Tensors3 norm_composite(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps,
                        at::ScalarType dtype) {
  const Tensor sum = given(update) ? x + update->to(x.scalar_type()) : x;
  const Tensor out = at::rms_norm(sum, {sum.size(-1)}, weight.to(sum.scalar_type()), eps).to(dtype);
  return {out, given(update) ? sum : none(x), none(x)};
}

Tensors3 call_norm(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps, at::ScalarType dtype) {
  static const auto operation = find_operation<decltype(norm_composite)>("sparsek::_add_rms_norm");
  return operation.call(x, update, weight, eps, dtype);
}

using NormBackward = Tensors3(const Tensor& dout, const MaybeTensor& dsum, const Tensor& sum, const Tensor& rstd,
                              const Tensor& weight, bool has_update, bool weight_gradient);

struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const MaybeTensor& update, const Tensor& weight,
                               double eps, at::ScalarType dtype) {
    ctx->set_materialize_grads(false);
    const BelowAutograd below;
    const auto [out, sum, rstd] = call_norm(x, update, weight, eps, dtype);
    const bool has_update = given(update);
    ctx->save_for_backward({has_update ? sum : x, rstd, weight});
    ctx->saved_data["has_update"] = has_update;
    ctx->saved_data["dtype"] = dtype;
    ctx->mark_non_differentiable({rstd});
    return {out, sum, rstd};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool has_update = ctx->saved_data["has_update"].toBool();
    const bool weight_gradient = saved[2].requires_grad();
    const Tensor dout =
        grads[0].defined()
            ? grads[0]
            : at::zeros(saved[0].sizes(), saved[0].options().dtype(ctx->saved_data["dtype"].toScalarType()));
    static const auto operation = find_operation<NormBackward>("sparsek::_add_rms_norm_backward");
    const auto [dx, dupdate, dweight] = operation.call(dout, has_update ? maybe(grads[1]) : MaybeTensor(), saved[0],
                                                       saved[1], saved[2], has_update, weight_gradient);
    return {dx, has_update ? dupdate : Tensor(), weight_gradient ? dweight : Tensor(), {}, {}};
  }
};

Tensors3 norm_autograd(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps,
                       at::ScalarType dtype) {
  const variable_list out = NormFunction::apply(x, update, weight, eps, dtype);
  return {out[0], out[1], out[2]};
}

// split_rotary.

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const Tensor wide = x.to(cos.scalar_type());
  const int64_t half = x.size(-1) / 2;
  const Tensor a = wide.narrow(-1, 0, half), b = wide.narrow(-1, half, half);
  return at::cat({a * cos - b * sin, b * cos + a * sin}, -1).to(x.scalar_type());
}

// The gradient of a rotation is the rotation back: nothing but the angles is kept.
struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotated(gradients[0], saved[0], -saved[1]), {}, {}};
  }
};

Tensors5 rotary_composite(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                          const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads) {
  const int64_t head_dim = 2 * cos.size(-1);
  const auto heads = [&](int64_t first, int64_t count) {
    return qkv.narrow(-1, first * head_dim, count * head_dim).unflatten(-1, {count, head_dim});
  };
  const Tensor q = heads(0, num_heads), k = heads(num_heads, num_kv_heads),
               v = heads(num_heads + num_kv_heads, num_kv_heads);
  const Tensor q_far = given(far_cos) ? Rotate::apply(q, *far_cos, *far_sin) : none(qkv);
  return {Rotate::apply(q, cos, sin), Rotate::apply(k, cos, sin), v, q_far, given(far_cos) ? k : none(qkv)};
}

Tensors5 call_rotary(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                     const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads) {
  static const auto operation = find_operation<decltype(rotary_composite)>("sparsek::_split_rotary");
  return operation.call(qkv, cos, sin, far_cos, far_sin, num_heads, num_kv_heads);
}

using RotaryBackward = Tensor(const Tensor& dq, const Tensor& dk, const Tensor& dv, const MaybeTensor& dq_far,
                              const MaybeTensor& dk_far, const Tensor& cos, const Tensor& sin,
                              const MaybeTensor& far_cos, const MaybeTensor& far_sin);

struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                               const MaybeTensor& far_cos, const MaybeTensor& far_sin, int64_t num_heads,
                               int64_t num_kv_heads) {
    ctx->save_for_backward({cos, sin, far_cos.value_or(Tensor()), far_sin.value_or(Tensor())});
    const BelowAutograd below;
    const auto [q, k, v, q_far, k_far] = call_rotary(qkv, cos, sin, far_cos, far_sin, num_heads, num_kv_heads);
    return {q, k, v, q_far, k_far};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool far = saved[2].defined();
    static const auto operation = find_operation<RotaryBackward>("sparsek::_split_rotary_backward");
    const Tensor dqkv =
        operation.call(grads[0], grads[1], grads[2], far ? maybe(grads[3]) : MaybeTensor(),
                       far ? maybe(grads[4]) : MaybeTensor(), saved[0], saved[1], maybe(saved[2]), maybe(saved[3]));
    return {dqkv, {}, {}, {}, {}, {}, {}};
  }
};

Tensors5 rotary_autograd(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                         const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads) {
  const variable_list out = RotaryFunction::apply(qkv, cos, sin, far_cos, far_sin, num_heads, num_kv_heads);
  return {out[0], out[1], out[2], out[3], out[4]};
}

// swiglu.

Tensor swiglu_composite(const Tensor& gate_up) {
  const int64_t ffn = gate_up.size(-1) / 2;
  return at::silu(gate_up.narrow(-1, 0, ffn)) * gate_up.narrow(-1, ffn, ffn);
}

Tensor call_swiglu(const Tensor& gate_up) {
  static const auto operation = find_operation<decltype(swiglu_composite)>("sparsek::_swiglu");
  return operation.call(gate_up);
}

using SwigluBackward = Tensor(const Tensor& dout, const Tensor& gate_up);

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    const BelowAutograd below;
    return call_swiglu(gate_up);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto operation = find_operation<SwigluBackward>("sparsek::_swiglu_backward");
    return {operation.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

Tensor swiglu_autograd(const Tensor& gate_up) {
  return SwigluFunction::apply(gate_up);
}

// cross_entropy_.

Tensors2 cross_entropy_composite(Tensor& logits, const Tensor& targets, const MaybeTensor& teacher, int64_t ignored,
                                 double next_token_weight, double kl_weight, bool writes_gradient) {
  const at::ScalarType wide = scores_dtype(logits.scalar_type());
  const Tensor log_p = at::log_softmax(logits, -1, wide);
  const Tensor valid = targets.ne(ignored), index = at::where(valid, targets, at::zeros_like(targets)).unsqueeze(1);
  const auto of_valid = [&](const Tensor& x) { return at::where(valid, x, at::zeros_like(x)); };
  const Tensor losses = of_valid(-log_p.gather(1, index).squeeze(1));
  Tensor divergences = none(log_p), log_teacher;
  if (given(teacher)) {
    log_teacher = at::log_softmax(*teacher, -1, wide);
    divergences = of_valid((log_teacher.exp() * (log_teacher - log_p)).sum(-1));
  }
  if (!writes_gradient) return {losses, divergences};
  // d cross-entropy = p - onehot(target), d KL(teacher || p) = p - p_teacher.
  Tensor dlogits = log_p.exp() * (next_token_weight + (given(teacher) ? kl_weight : 0));
  if (next_token_weight != 0) {
    dlogits.scatter_add_(1, index, at::zeros_like(index, log_p.options()).fill_(-next_token_weight));
  }
  if (given(teacher)) dlogits -= log_teacher.exp_().mul_(kl_weight);
  logits.copy_(dlogits * valid.unsqueeze(1));
  return {losses, divergences};
}

Tensors2 call_cross_entropy(Tensor& logits, const Tensor& targets, const MaybeTensor& teacher, int64_t ignored,
                            double next_token_weight, double kl_weight, bool writes_gradient) {
  static const auto operation = find_operation<decltype(cross_entropy_composite)>("sparsek::_cross_entropy_");
  return operation.call(logits, targets, teacher, ignored, next_token_weight, kl_weight, writes_gradient);
}

}  // namespace

SumAndNorm add_rms_norm(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps,
                        at::ScalarType dtype) {
  const auto [out, sum, rstd] = call_norm(x, update, weight, eps, dtype);
  return {given(update) ? sum : x, out};
}

RotatedHeads split_rotary(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                          const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads) {
  auto [q, k, v, q_far, k_far] = call_rotary(qkv, cos, sin, far_cos, far_sin, num_heads, num_kv_heads);
  if (!given(far_cos)) return {q, k, v, {}, {}};
  return {q, k, v, q_far, k_far};
}

Tensor swiglu(const Tensor& gate_up) {
  return call_swiglu(gate_up);
}

TokenLosses cross_entropy_(Tensor& logits, const Tensor& targets, const MaybeTensor& teacher,
                           const CrossEntropyOptions& options) {
  const auto [losses, divergences] = call_cross_entropy(
      logits, targets, teacher, options.ignored, options.next_token_weight, options.kl_weight, options.writes_gradient);
  return {losses, divergences};
}

TORCH_LIBRARY_IMPL(sparsek, CompositeImplicitAutograd, m) {
  m.impl("_add_rms_norm", norm_composite);
  m.impl("_split_rotary", rotary_composite);
  m.impl("_swiglu", swiglu_composite);
}
TORCH_LIBRARY_IMPL(sparsek, CompositeExplicitAutograd, m) {
  m.impl("_cross_entropy_", cross_entropy_composite);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  // A gradient of what was written in place is an error and not silently missing.
  m.impl("_cross_entropy_", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(sparsek, AutogradCUDA, m) {
  m.impl("_add_rms_norm", norm_autograd);
  m.impl("_split_rotary", rotary_autograd);
  m.impl("_swiglu", swiglu_autograd);
  // A gradient through a gradient is an error and not silently wrong.
  m.impl("_add_rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_split_rotary_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sparsek::ops
