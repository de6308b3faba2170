// _attention_rows and attention_backward: eq. 7-11 on rows (kernels/params.h), what whole sequences and chunks share.
// The gradient of every attention operation comes from here.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/cpu/attention/attention.h"
#include "ops/checks.h"
#include "ops/once_differentiable.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What forward and backward read.
struct Rows {
  const Tensor &q, &k, &v;
  const MaybeTensor &q_far, &k_far;
  const Tensor &row_scores, &tau, &window_begin, &far_begin, &far_end, &frac_begin, &frac_end;
  std::string_view gate;
  double softmax_scale;
};

void check(const Rows& rows) {
  const Tensor &q = rows.q, &k = rows.k;
  const Argument like{"q", q, "[batch, seqlen_q, num_heads, head_dim]"};
  const char* key_layout = "[batch, seqlen_k, num_kv_heads, head_dim]";
  check_ndim(like, 4);
  check_ndim({"k", k, key_layout}, 4);
  const at::ScalarType dtype = q.scalar_type(), score_dtype = scores_dtype(dtype);
  dtype_of(q);
  const int64_t batch = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2), head_dim = q.size(3),
                seqlen_k = k.size(1), num_kv_heads = k.size(2);
  const auto check_keys = [&](const char* name, const Tensor& tensor) {
    const Argument argument{name, tensor, key_layout};
    check_tensor(argument, {batch, seqlen_k, num_kv_heads, head_dim}, dtype, like);
    check_inner_contiguous(argument);
  };
  check_inner_contiguous(like);
  check_keys("k", k);
  check_keys("v", rows.v);
  TORCH_CHECK_VALUE(given(rows.q_far) == given(rows.k_far), "q_far and k_far must be given together");
  if (given(rows.q_far)) {
    const Argument q_far{"q_far", *rows.q_far, like.layout};
    check_tensor(q_far, {batch, seqlen_q, num_heads, head_dim}, dtype, like);
    check_inner_contiguous(q_far);
    check_keys("k_far", *rows.k_far);
  }
  TORCH_CHECK_VALUE(num_kv_heads >= 1 && num_heads % num_kv_heads == 0,
                    "num_heads must be a multiple of num_kv_heads, got ", num_heads, " and ", num_kv_heads);
  TORCH_CHECK_VALUE(seqlen_k >= seqlen_q, "k must hold the queries' own keys last: at least ", seqlen_q, " rows, got ",
                    seqlen_k);
  TORCH_CHECK_VALUE(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0,
                    "head_dim must be a multiple of 8 up to 256, got ", head_dim);
  check_ndim({"row_scores", rows.row_scores, "[batch, num_kv_heads, num_pool_rows + seqlen_k]"}, 3);
  const int64_t score_rows = rows.row_scores.size(2);
  TORCH_CHECK_VALUE(score_rows >= seqlen_k, "row_scores must hold one score for each of the ", seqlen_k,
                    " key rows, got ", score_rows);
  const char* layout = "[batch, num_kv_heads, rows]";
  check_tensor({"row_scores", rows.row_scores, layout}, {batch, num_kv_heads, score_rows}, score_dtype, like);
  check_tensor({"tau", rows.tau, "[batch, num_kv_heads, seqlen_q]"}, {batch, num_kv_heads, seqlen_q}, score_dtype,
               like);
  check_tensor({"window_begin", rows.window_begin, "[batch, seqlen_q]"}, {batch, seqlen_q}, at::kInt, like);
  check_tensor({"far_begin", rows.far_begin, layout}, {batch, num_kv_heads, seqlen_k}, at::kInt, like);
  check_tensor({"far_end", rows.far_end, layout}, {batch, num_kv_heads, seqlen_k}, at::kInt, like);
  check_tensor({"frac_begin", rows.frac_begin, layout}, {batch, num_kv_heads, score_rows}, at::kInt, like);
  check_tensor({"frac_end", rows.frac_end, layout}, {batch, num_kv_heads, score_rows}, at::kInt, like);
  check_gate(rows.gate);
}

// CPU only. The gradient counts queries where fractions begin and end: [begin, end) must lie in the chunk's queries.
void check_fractions(const Tensor& frac_begin, const Tensor& frac_end, int64_t seqlen_q) {
  const int32_t *begins = int32_data(frac_begin), *ends = int32_data(frac_end);
  for (int64_t i = 0; i < frac_begin.numel(); ++i) {
    TORCH_CHECK_VALUE(begins[i] >= ends[i] || (begins[i] >= 0 && ends[i] <= seqlen_q),
                      "frac_begin and frac_end must lie between 0 and seqlen_q = ", seqlen_q, ", got [", begins[i],
                      ", ", ends[i], ")");
  }
}

Tensors2 allocate_outputs(const Tensor& q) {
  return {at::empty_symint(q.sym_sizes(), q.options()),
          empty_of({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, q.options().dtype(scores_dtype(q.scalar_type())))};
}

// The parameters, and the contiguous copies they point to.
struct Forward {
  Tensor scores, tau, window_begin, far_begin, far_end;
  AttentionFwdParams params{};

  Forward(const Rows& rows, const Tensor& out, const Tensor& softmax_lse)
      : scores(rows.row_scores.slice(2, rows.row_scores.size(2) - rows.k.size(1)).contiguous()),
        tau(rows.tau.contiguous()),
        window_begin(rows.window_begin.contiguous()),
        far_begin(rows.far_begin.contiguous()),
        far_end(rows.far_end.contiguous()) {
    params.dtype = dtype_of(rows.q);
    params.q = rows.q.const_data_ptr();
    params.k = rows.k.const_data_ptr();
    params.v = rows.v.const_data_ptr();
    params.q_far = data_or_null<void>(rows.q_far);
    params.k_far = data_or_null<void>(rows.k_far);
    params.scores = scores.const_data_ptr();
    params.tau = tau.const_data_ptr();
    params.window_begin = int32_data(window_begin);
    params.far_begin = int32_data(far_begin);
    params.far_end = int32_data(far_end);
    params.out = out.data_ptr();
    params.softmax_lse = softmax_lse.data_ptr();
    params.q_strides = strides_of(rows.q);
    params.k_strides = strides_of(rows.k);
    params.v_strides = strides_of(rows.v);
    if (params.q_far != nullptr) {
      params.q_far_strides = strides_of(*rows.q_far);
      params.k_far_strides = strides_of(*rows.k_far);
    }
    params.out_strides = strides_of(out);
    params.batch = checked_int32("batch", rows.q.size(0));
    params.seqlen_q = checked_int32("seqlen_q", rows.q.size(1));
    params.seqlen_k = checked_int32("seqlen_k", rows.k.size(1));
    params.num_carried = params.seqlen_k - params.seqlen_q;
    params.num_heads = checked_int32("num_heads", rows.q.size(2));
    params.num_kv_heads = checked_int32("num_kv_heads", rows.k.size(2));
    params.head_dim = checked_int32("head_dim", rows.q.size(3));
    params.gate = gate_of(rows.gate);
    params.softmax_scale = rows.softmax_scale;
  }
};

Tensors2 attention_rows_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                            const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                            const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                            const Tensor& frac_begin, const Tensor& frac_end, std::string_view gate,
                            double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                            const MaybeTensor& far_lists) {
  const Rows rows{q,         k,       v,          q_far,    k_far, row_scores,   tau, window_begin,
                  far_begin, far_end, frac_begin, frac_end, gate,  softmax_scale};
  check(rows);
  const auto [out, softmax_lse] = allocate_outputs(q);
  const Forward forward(rows, out, softmax_lse);
  check_rows_values(forward.window_begin, forward.far_begin, forward.far_end);
  cpu::attention_forward(forward.params);
  return {out, softmax_lse};
}

Tensors2 attention_rows_meta(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                             const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                             const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                             const Tensor& frac_begin, const Tensor& frac_end, std::string_view gate,
                             double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                             const MaybeTensor& far_lists) {
  return allocate_outputs(q);
}

Tensors6 allocate_gradients(const Tensor& q, const Tensor& k, bool far, const Tensor& row_scores) {
  const auto like = [](const Tensor& tensor) { return at::empty_symint(tensor.sym_sizes(), tensor.options()); };
  const auto none = [&] { return empty_of({0}, q.options()); };
  return {like(q), like(k), like(k), far ? like(q) : none(), far ? like(k) : none(), like(row_scores)};
}

Tensors6 backward_cpu(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                      const MaybeTensor& q_far, const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                      const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                      const Tensor& frac_begin, const Tensor& frac_end, const Tensor& out, const Tensor& softmax_lse,
                      std::string_view gate, double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                      const MaybeTensor& far_lists) {
  const Rows rows{q,         k,       v,          q_far,    k_far, row_scores,   tau, window_begin,
                  far_begin, far_end, frac_begin, frac_end, gate,  softmax_scale};
  check(rows);
  const Argument like{"q", q, ""};
  const char* layout = "[batch, seqlen_q, num_heads, head_dim]";
  const char* lse_layout = "[batch, num_heads, seqlen_q]";
  check_tensor({"out", out, layout}, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type(), like);
  check_tensor({"dout", dout, layout}, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type(), like);
  check_tensor({"softmax_lse", softmax_lse, lse_layout}, {q.size(0), q.size(2), q.size(1)},
               scores_dtype(q.scalar_type()), like);
  if (given(dlse)) {
    check_tensor({"dlse", *dlse, lse_layout}, {q.size(0), q.size(2), q.size(1)}, scores_dtype(q.scalar_type()), like);
  }
  const Tensor lse = softmax_lse.contiguous(), outputs = out.contiguous();
  const Tensor frac_begins = frac_begin.contiguous(), frac_ends = frac_end.contiguous();
  check_fractions(frac_begins, frac_ends, q.size(1));
  const Tensor dout_rows = dout.stride(3) == 1 ? dout : dout.contiguous();  // sum().backward() gives stride 0
  const MaybeTensor dlse_rows = given(dlse) ? MaybeTensor(dlse->contiguous()) : MaybeTensor();
  const bool far = given(q_far);
  Tensors6 gradients = allocate_gradients(q, k, far, row_scores);
  auto& [dq, dk, dv, dq_far, dk_far, dscores] = gradients;
  const Forward forward(rows, outputs, lse);
  check_rows_values(forward.window_begin, forward.far_begin, forward.far_end);
  AttentionBwdParams params{};
  params.fwd = forward.params;
  params.dout = dout_rows.const_data_ptr();
  params.dlse = data_or_null<void>(dlse_rows);
  params.frac_begin = int32_data(frac_begins);
  params.frac_end = int32_data(frac_ends);
  params.dq = dq.data_ptr();
  params.dk = dk.data_ptr();
  params.dv = dv.data_ptr();
  params.dq_far = far ? dq_far.data_ptr() : nullptr;
  params.dk_far = far ? dk_far.data_ptr() : nullptr;
  params.dscores = dscores.data_ptr();
  params.dout_strides = strides_of(dout_rows);
  params.num_pool_rows = checked_int32("pool rows", row_scores.size(2) - k.size(1));
  params.deterministic = deterministic;
  cpu::attention_backward(params);
  return gradients;
}

Tensors6 backward_meta(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const MaybeTensor& q_far, const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                       const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                       const Tensor& frac_begin, const Tensor& frac_end, const Tensor& out, const Tensor& softmax_lse,
                       std::string_view gate, double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                       const MaybeTensor& far_lists) {
  return allocate_gradients(q, k, given(q_far), row_scores);
}

Tensors6 call_backward(const Tensor& dout, const MaybeTensor& dlse, const Rows& rows, const Tensor& out,
                       const Tensor& softmax_lse, bool deterministic, std::optional<int64_t> max_far,
                       const MaybeTensor& far_lists) {
  static const auto operation = find_operation<decltype(backward_cpu)>("sparsek::attention_backward");
  return operation.call(dout, dlse, rows.q, rows.k, rows.v, rows.q_far, rows.k_far, rows.row_scores, rows.tau,
                        rows.window_begin, rows.far_begin, rows.far_end, rows.frac_begin, rows.frac_end, out,
                        softmax_lse, rows.gate, rows.softmax_scale, deterministic, max_far, far_lists);
}

Tensors6 backward_autograd(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                           const Tensor& v, const MaybeTensor& q_far, const MaybeTensor& k_far,
                           const Tensor& row_scores, const Tensor& tau, const Tensor& window_begin,
                           const Tensor& far_begin, const Tensor& far_end, const Tensor& frac_begin,
                           const Tensor& frac_end, const Tensor& out, const Tensor& softmax_lse, std::string_view gate,
                           double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                           const MaybeTensor& far_lists) {
  const Rows rows{q,         k,       v,          q_far,    k_far, row_scores,   tau, window_begin,
                  far_begin, far_end, frac_begin, frac_end, gate,  softmax_scale};
  std::vector<Tensor> differentiable = {dout, q, k, v, row_scores, out, softmax_lse};
  for (const MaybeTensor* tensor : {&dlse, &q_far, &k_far}) {
    if (given(*tensor)) differentiable.push_back(**tensor);
  }
  const variable_list g =
      RefuseSecondDerivative::apply(at::TensorList(differentiable), "attention_backward", [&]() -> variable_list {
        const auto [dq, dk, dv, dq_far, dk_far, dscores] =
            call_backward(dout, dlse, rows, out, softmax_lse, deterministic, max_far, far_lists);
        return {dq, dk, dv, dq_far, dk_far, dscores};
      });
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

struct AttentionRowsFunction : torch::autograd::Function<AttentionRowsFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const MaybeTensor& q_far, const MaybeTensor& k_far, const Tensor& row_scores,
                               const Tensor& tau, const Tensor& window_begin, const Tensor& far_begin,
                               const Tensor& far_end, const Tensor& frac_begin, const Tensor& frac_end,
                               const std::string& gate, double softmax_scale, bool deterministic,
                               std::optional<int64_t> max_far, const MaybeTensor& far_lists) {
    ctx->set_materialize_grads(false);
    const BelowAutograd below;
    const auto [out, softmax_lse] =
        call_attention_rows(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin,
                            frac_end, gate, softmax_scale, deterministic, max_far, far_lists);
    ctx->save_for_backward({q, k, v, q_far.value_or(Tensor()), k_far.value_or(Tensor()), row_scores, tau, window_begin,
                            far_begin, far_end, frac_begin, frac_end, out, softmax_lse, far_lists.value_or(Tensor())});
    ctx->saved_data["gate"] = gate;
    ctx->saved_data["softmax_scale"] = softmax_scale;
    ctx->saved_data["deterministic"] = deterministic;
    ctx->saved_data["max_far"] = max_far;
    return {out, softmax_lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto maybe = [](const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : MaybeTensor(); };
    const MaybeTensor q_far = maybe(saved[3]), k_far = maybe(saved[4]), dlse = maybe(grads[1]);
    const std::string gate = ctx->saved_data["gate"].toStringRef();
    const Rows rows{
        saved[0], saved[1], saved[2], q_far,     k_far,     saved[5], saved[6],
        saved[7], saved[8], saved[9], saved[10], saved[11], gate,     ctx->saved_data["softmax_scale"].toDouble()};
    const Tensor& out = saved[12];
    const Tensor dout = grads[0].defined() ? grads[0] : at::zeros_like(out);
    const auto [dq, dk, dv, dq_far, dk_far, dscores] =
        call_backward(dout, dlse, rows, out, saved[13], ctx->saved_data["deterministic"].toBool(),
                      ctx->saved_data["max_far"].toOptional<int64_t>(), maybe(saved[14]));
    const bool far = q_far.has_value();
    return {dq, dk, dv, far ? dq_far : Tensor(), far ? dk_far : Tensor(), dscores, {}, {}, {}, {}, {}, {}, {}, {},
            {}, {}, {}};
  }
};

Tensors2 attention_rows_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                                 const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                                 const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                                 const Tensor& frac_begin, const Tensor& frac_end, std::string_view gate,
                                 double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                                 const MaybeTensor& far_lists) {
  const variable_list out =
      AttentionRowsFunction::apply(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin,
                                   frac_end, std::string(gate), softmax_scale, deterministic, max_far, far_lists);
  return {out[0], out[1]};
}

}  // namespace

Tensors2 call_attention_rows(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                             const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                             const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                             const Tensor& frac_begin, const Tensor& frac_end, std::string_view gate,
                             double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                             const MaybeTensor& far_lists) {
  static const auto operation = find_operation<decltype(attention_rows_cpu)>("sparsek::_attention_rows");
  return operation.call(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end,
                        gate, softmax_scale, deterministic, max_far, far_lists);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("_attention_rows", attention_rows_cpu);
  m.impl("attention_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("_attention_rows", attention_rows_meta);
  m.impl("attention_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("_attention_rows", attention_rows_autograd);
  m.impl("attention_backward", backward_autograd);
}

}  // namespace sparsek::ops
