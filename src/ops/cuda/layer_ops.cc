// The operations between attention layers (ops/layer_ops.h) on the GPU.
#include <algorithm>
#include <optional>
#include <span>

#include "kernels/cuda/cross_entropy/cross_entropy.h"
#include "kernels/cuda/elementwise/elementwise.h"
#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Same sizes as `like`, this dtype, same device.
void check_like(const Argument& argument, ScalarType dtype, const Argument& like) {
  check_tensor(argument, sizes_of(like.tensor), dtype, like);
}

int64_t check_rows(const Argument& argument) {
  check_on_gpu(argument);
  check_value(argument.tensor.dim() >= 1, argument.name, " must be ", argument.layout, ", got a scalar");
  return argument.tensor.size(argument.tensor.dim() - 1);
}

int64_t rows_of(const Tensor& tensor, int64_t dim) {
  return dim == 0 ? 0 : tensor.numel() / dim;
}

Tensor nothing(const Tensor& like) {
  return empty({0}, like.scalar_type(), like);
}

Tensors3 add_rms_norm(const Tensor& x, const MaybeTensor& update, const Tensor& weight, double eps, ScalarType dtype) {
  const Argument like{"x", x, "[..., dim]"};
  const int64_t dim = check_rows(like);
  check_like(like, ScalarType::Float, like);
  const bool has_update = given(update);
  if (has_update) check_like({"update", *update, like.layout}, dtype, like);
  check_tensor({"weight", weight, "[dim]"}, {dim}, ScalarType::Float, like);
  const OnDevice here(x);
  const Tensor values = as_contiguous(x), scale = as_contiguous(weight);
  const MaybeTensor updates = as_contiguous(update);
  const int64_t rows = rows_of(x, dim);
  const Tensor out = new_like(x, dtype), sum = has_update ? new_like(x) : nothing(x);
  const Tensor rstd = empty({rows}, ScalarType::Float, x);
  sparsek::cuda::rms_norm({.x = const_data<float>(values),
                           .update = data_or_null<void>(updates),
                           .weight = const_data<float>(scale),
                           .out = out.mutable_data_ptr(),
                           .sum = has_update ? data<float>(sum) : nullptr,
                           .rstd = data<float>(rstd),
                           .x_stride = dim,
                           .out_stride = dim,
                           .rows = rows,
                           .dim = checked_int32("dim", dim),
                           .eps = static_cast<float>(eps),
                           .dtype = check_half("dtype", dtype)},
                          here.stream());
  return {out, sum, rstd};
}

Tensors3 add_rms_norm_backward(const Tensor& dout, const MaybeTensor& dsum, const Tensor& sum, const Tensor& rstd,
                               const Tensor& weight, bool has_update, bool weight_gradient) {
  const Argument like{"sum", sum, "[..., dim]"};
  const int64_t dim = check_rows(like), rows = rows_of(sum, dim);
  check_like(like, ScalarType::Float, like);
  const ScalarType dtype = dout.scalar_type();
  check_like({"dout", dout, like.layout}, dtype, like);
  if (given(dsum)) check_like({"dsum", *dsum, like.layout}, ScalarType::Float, like);
  check_tensor({"rstd", rstd, "[rows]"}, {rows}, ScalarType::Float, like);
  check_tensor({"weight", weight, "[dim]"}, {dim}, ScalarType::Float, like);
  const OnDevice here(sum);
  const Tensor gradient = as_contiguous(dout), values = as_contiguous(sum), scale = as_contiguous(weight);
  const MaybeTensor passed = as_contiguous(dsum);
  const Tensor dx = new_like(sum), dupdate = has_update ? new_like(dout) : nothing(dout);
  const Tensor dweight = weight_gradient ? new_like(weight) : nothing(weight);
  const sparsek::cuda::RmsNormBwdParams params{.dout = gradient.const_data_ptr(),
                                               .dsum = data_or_null<float>(passed),
                                               .sum = const_data<float>(values),
                                               .rstd = const_data<float>(rstd),
                                               .weight = const_data<float>(scale),
                                               .dx = data<float>(dx),
                                               .dupdate = has_update ? dupdate.mutable_data_ptr() : nullptr,
                                               .dweight = weight_gradient ? data<float>(dweight) : nullptr,
                                               .rows = rows,
                                               .dim = checked_int32("dim", dim),
                                               .dtype = check_half("dout", dtype)};
  const Tensor workspace = here.workspace(sparsek::cuda::rms_norm_backward_workspace_bytes(params));
  sparsek::cuda::rms_norm_backward(params, workspace.mutable_data_ptr(), here.stream());
  return {dx, dupdate, dweight};
}

// cos and sin, with what they point to.
struct Angles {
  Tensor cos, sin;
  int64_t batch_stride = 0, token_stride = 0;

  Angles(const Tensor& cos, const Tensor& sin, const Argument& like, int64_t batch, int64_t seqlen, int64_t half)
      : cos(as_contiguous(cos)), sin(as_contiguous(sin)) {
    check_ndim({"cos", cos, "[1 or batch, 1 or seqlen, 1, head_dim / 2]"}, 4);
    const int64_t rows = cos.size(0), tokens = cos.size(1);
    check_value((rows == 1 || rows == batch) && (tokens == 1 || tokens == seqlen),
                "cos must be [1 or batch, 1 or seqlen, 1, head_dim / 2] for ", like.name, " ", shape_text(like.tensor),
                ", got ", shape_text(cos));
    check_tensor({"cos", cos, ""}, {rows, tokens, 1, half}, ScalarType::Float, like);
    check_tensor({"sin", sin, ""}, {rows, tokens, 1, half}, ScalarType::Float, like);
    batch_stride = rows == 1 ? 0 : tokens * half;
    token_stride = tokens == 1 ? 0 : half;
  }
};

// `heads` heads of x [batch, seqlen, ...] from element `first` of a token on.
sparsek::cuda::Rotation rotation(const Tensor& x, int64_t first, int64_t head_stride, const Angles* angles,
                                 bool is_inverse) {
  sparsek::cuda::Rotation r{.x = static_cast<const uint8_t*>(x.const_data_ptr()) + first * x.element_size(),
                            .x_batch_stride = x.stride(0),
                            .x_token_stride = x.stride(1),
                            .x_head_stride = head_stride,
                            .is_inverse = is_inverse};
  if (angles != nullptr) {
    r.cos = const_data<float>(angles->cos);
    r.sin = const_data<float>(angles->sin);
    r.angle_batch_stride = angles->batch_stride;
    r.angle_token_stride = angles->token_stride;
  }
  return r;
}

sparsek::cuda::RotaryPart part(const sparsek::cuda::Rotation& from, const Tensor& out, int64_t first, int64_t head_dim,
                               int64_t heads) {
  return {.first = from,
          .out = static_cast<uint8_t*>(out.mutable_data_ptr()) + first * out.element_size(),
          .out_batch_stride = out.stride(0),
          .out_token_stride = out.stride(1),
          .out_head_stride = head_dim,
          .heads = checked_int32("heads", heads)};
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensors5 split_rotary(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const MaybeTensor& far_cos,
                      const MaybeTensor& far_sin, int64_t num_heads, int64_t num_kv_heads) {
  const Argument like{"qkv", qkv, "[batch, seqlen, (num_heads + 2 num_kv_heads) head_dim]"};
  check_ndim(like, 3);
  check_on_gpu(like);
  const DType dtype = check_half(like);
  check_value(num_heads >= 1 && num_kv_heads >= 1, "num_heads and num_kv_heads must be at least 1, got ", num_heads,
              " and ", num_kv_heads);
  const int64_t batch = qkv.size(0), seqlen = qkv.size(1), heads = num_heads + 2 * num_kv_heads;
  const int64_t head_dim = qkv.size(2) / heads;
  check_value(head_dim * heads == qkv.size(2) && head_dim % 2 == 0, "qkv must be ", like.layout,
              " with an even head_dim, got ", shape_text(qkv), " for ", num_heads, " and ", num_kv_heads, " heads");
  check_value(given(far_cos) == given(far_sin), "far_cos and far_sin must be given together");
  const OnDevice here(qkv);
  const Angles angles(cos, sin, like, batch, seqlen, head_dim / 2);
  const bool far = given(far_cos);
  const std::optional<Angles> far_angles =
      far ? std::optional<Angles>(std::in_place, *far_cos, *far_sin, like, batch, seqlen, head_dim / 2) : std::nullopt;
  const Tensor x = with_contiguous_rows(qkv);
  const auto rows = [&](int64_t count) { return empty({batch, seqlen, count, head_dim}, qkv.scalar_type(), qkv); };
  const Tensor q = rows(num_heads), k = rows(num_kv_heads), v = rows(num_kv_heads);
  const Tensor q_far = far ? rows(num_heads) : nothing(qkv), k_far = far ? rows(num_kv_heads) : nothing(qkv);
  const auto from = [&](int64_t head, const Angles* by) { return rotation(x, head * head_dim, head_dim, by, false); };
  sparsek::cuda::RotaryParams params{
      .head_dim = checked_int32("head_dim", head_dim), .batch = batch, .tokens = seqlen, .dtype = dtype};
  const auto add = [&](const Tensor& out, int64_t head, const Angles* by, int64_t count) {
    params.parts[params.num_parts++] = part(from(head, by), out, 0, head_dim, count);
  };
  add(q, 0, &angles, num_heads);
  if (far) add(q_far, 0, &*far_angles, num_heads);
  add(k, num_heads, &angles, num_kv_heads);
  if (far) add(k_far, num_heads, nullptr, num_kv_heads);
  add(v, num_heads + num_kv_heads, nullptr, num_kv_heads);
  sparsek::cuda::rotary(params, here.stream());
  return {q, k, v, q_far, k_far};
}

Tensor split_rotary_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const MaybeTensor& dq_far,
                             const MaybeTensor& dk_far, const Tensor& cos, const Tensor& sin,
                             const MaybeTensor& far_cos, const MaybeTensor& far_sin) {
  const Argument like{"dq", dq, "[batch, seqlen, num_heads, head_dim]"};
  check_ndim(like, 4);
  check_ndim({"dk", dk, "[batch, seqlen, num_kv_heads, head_dim]"}, 4);
  check_on_gpu(like);
  const DType dtype = check_half(like);
  const int64_t batch = dq.size(0), seqlen = dq.size(1), num_heads = dq.size(2), head_dim = dq.size(3);
  const int64_t num_kv_heads = dk.size(2), heads = num_heads + 2 * num_kv_heads;
  const auto check = [&](const char* name, const Tensor& tensor, int64_t count) {
    check_tensor({name, tensor, "[batch, seqlen, heads, head_dim]"}, {batch, seqlen, count, head_dim}, dq.scalar_type(),
                 like);
  };
  check("dk", dk, num_kv_heads);
  check("dv", dv, num_kv_heads);
  const bool far = given(dq_far);
  check_value(given(dk_far) == far && given(far_cos) == far && given(far_sin) == far,
              "dq_far, dk_far, far_cos and far_sin must be given together");
  if (far) {
    check("dq_far", *dq_far, num_heads);
    check("dk_far", *dk_far, num_kv_heads);
  }
  const OnDevice here(dq);
  const Angles angles(cos, sin, like, batch, seqlen, head_dim / 2);
  const std::optional<Angles> far_angles =
      far ? std::optional<Angles>(std::in_place, *far_cos, *far_sin, like, batch, seqlen, head_dim / 2) : std::nullopt;
  const Tensor q = with_contiguous_rows(dq), k = with_contiguous_rows(dk), v = with_contiguous_rows(dv);
  const MaybeTensor q_far = far ? MaybeTensor(with_contiguous_rows(*dq_far)) : MaybeTensor();
  const MaybeTensor k_far = far ? MaybeTensor(with_contiguous_rows(*dk_far)) : MaybeTensor();
  const Tensor dqkv = empty({batch, seqlen, heads * head_dim}, dq.scalar_type(), dq);
  sparsek::cuda::RotaryParams params{.num_parts = 3,
                                     .head_dim = checked_int32("head_dim", head_dim),
                                     .batch = batch,
                                     .tokens = seqlen,
                                     .dtype = dtype};
  const auto back = [&](const Tensor& x, const Angles* by) { return rotation(x, 0, x.stride(2), by, true); };
  params.parts[0] = part(back(q, &angles), dqkv, 0, head_dim, num_heads);
  params.parts[1] = part(back(k, &angles), dqkv, num_heads * head_dim, head_dim, num_kv_heads);
  params.parts[2] = part(back(v, nullptr), dqkv, (num_heads + num_kv_heads) * head_dim, head_dim, num_kv_heads);
  if (far) {
    params.parts[0].second = back(*q_far, &*far_angles);
    params.parts[1].second = back(*k_far, nullptr);
  }
  sparsek::cuda::rotary(params, here.stream());
  return dqkv;
}

// ffn of gate_up [..., 2 ffn].
int64_t check_gate_up(const Argument& gate_up) {
  const int64_t both = check_rows(gate_up);
  check_value(both % 2 == 0, "gate_up must be [..., 2 ffn], got ", shape_text(gate_up.tensor));
  return both / 2;
}

Tensor like_but_last(const Tensor& tensor, int64_t last) {
  int64_t sizes[8] = {};
  const auto from = tensor.sizes();
  check_value(from.size() <= 8, "gate_up must have at most 8 dimensions, got ", shape_text(tensor));
  std::copy(from.begin(), from.end(), sizes);
  sizes[from.size() - 1] = last;
  return empty(std::span<const int64_t>(sizes, from.size()), tensor.scalar_type(), tensor.get_device_index());
}

Tensor swiglu(const Tensor& gate_up) {
  const Argument like{"gate_up", gate_up, "[..., 2 ffn]"};
  const int64_t ffn = check_gate_up(like);
  const DType dtype = check_half(like);
  const OnDevice here(gate_up);
  const Tensor values = as_contiguous(gate_up), out = like_but_last(gate_up, ffn);
  const auto* gate = static_cast<const uint8_t*>(values.const_data_ptr());
  sparsek::cuda::swiglu({.gate = gate,
                         .up = gate + ffn * values.element_size(),
                         .out = out.mutable_data_ptr(),
                         .gate_stride = 2 * ffn,
                         .up_stride = 2 * ffn,
                         .out_stride = ffn,
                         .rows = rows_of(values, 2 * ffn),
                         .ffn = checked_int32("ffn", ffn),
                         .dtype = dtype},
                        here.stream());
  return out;
}

Tensor swiglu_backward(const Tensor& dout, const Tensor& gate_up) {
  const Argument like{"gate_up", gate_up, "[..., 2 ffn]"};
  const int64_t ffn = check_gate_up(like), rows = rows_of(gate_up, 2 * ffn);
  const DType dtype = check_half(like);
  check_value(check_rows({"dout", dout, "[..., ffn]"}) == ffn && dout.numel() == rows * ffn &&
                  dout.scalar_type() == gate_up.scalar_type() && dout.get_device_index() == gate_up.get_device_index(),
              "dout must be [..., ffn] of gate_up's dtype on its GPU, got ", toString(dout.scalar_type()), " ",
              shape_text(dout), " for gate_up ", shape_text(gate_up));
  const OnDevice here(gate_up);
  const Tensor gradient = as_contiguous(dout), values = as_contiguous(gate_up), dgate_up = new_like(gate_up);
  sparsek::cuda::swiglu_backward({.dout = gradient.const_data_ptr(),
                                  .gate_up = values.const_data_ptr(),
                                  .dgate_up = dgate_up.mutable_data_ptr(),
                                  .rows = rows,
                                  .ffn = checked_int32("ffn", ffn),
                                  .dtype = dtype},
                                 here.stream());
  return dgate_up;
}

Tensors2 cross_entropy(const Tensor& logits, const Tensor& targets, const MaybeTensor& teacher, int64_t ignored,
                       double next_token_weight, double kl_weight, bool writes_gradient) {
  const Argument like{"logits", logits, "[rows, vocab_size]"};
  check_ndim(like, 2);
  check_on_gpu(like);
  const DType dtype = check_half(like);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  check_contiguous(like);
  check_tensor({"targets", targets, "[rows]"}, {rows}, ScalarType::Long, like);
  const bool has_teacher = given(teacher);
  if (has_teacher) {
    const Argument argument{"teacher", *teacher, like.layout};
    check_tensor(argument, {rows, vocab_size}, logits.scalar_type(), like);
    check_contiguous(argument);
  }
  const OnDevice here(logits);
  const Tensor wanted = as_contiguous(targets), losses = empty({rows}, ScalarType::Float, logits);
  const Tensor divergences = empty({has_teacher ? rows : 0}, ScalarType::Float, logits);
  sparsek::cuda::cross_entropy({.logits = logits.mutable_data_ptr(),
                                .teacher = data_or_null<void>(teacher),
                                .targets = const_data<int64_t>(wanted),
                                .losses = data<float>(losses),
                                .divergences = has_teacher ? data<float>(divergences) : nullptr,
                                .rows = rows,
                                .ignored = ignored,
                                .vocab_size = checked_int32("vocab_size", vocab_size),
                                .next_token_weight = static_cast<float>(next_token_weight),
                                .kl_weight = static_cast<float>(kl_weight),
                                .writes_gradient = writes_gradient,
                                .dtype = dtype},
                               here.stream());
  return {losses, divergences};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("_add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  m.impl("_split_rotary", TORCH_BOX(&split_rotary));
  m.impl("_split_rotary_backward", TORCH_BOX(&split_rotary_backward));
  m.impl("_swiglu", TORCH_BOX(&swiglu));
  m.impl("_swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("_cross_entropy_", TORCH_BOX(&cross_entropy));
}

}  // namespace sparsek::ops::cuda
