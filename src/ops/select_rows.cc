// _select_rows: selection and the rows that attention reads, in one (eq. 3-6). Only row_scores has a gradient: it is
// scores, transposed, with +inf for sinks. Also the check of documents that is an operation, so that compiled graphs
// keep it.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/far_lists.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensors8 select_rows_cpu(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                         std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens, int64_t far_lists_group) {
  TORCH_CHECK_VALUE(far_lists_group == 0, "far_lists_group must be 0 on the CPU, which reads no lists, got ",
                    far_lists_group);
  const auto [tau, expiry, frac_begin, frac_end] =
      call_select(scores, topk, window_size, num_sinks, pool_size, cu_seqlens);
  auto [row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end] =
      call_visibility(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
  return {row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end, int32_of({0}, scores)};
}

Tensors8 select_rows_meta(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                          std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens, int64_t far_lists_group) {
  check_scores("scores", scores);
  check_cu_seqlens(cu_seqlens, "scores", scores);
  check_window(window_size, num_sinks);
  check_selection(topk, pool_size);
  const c10::SymInt batch = scores.sym_size(0), seqlen = scores.sym_size(1), heads = scores.sym_size(2);
  const auto indices = [&] { return int32_of({batch, heads, seqlen}, scores); };
  const auto values = [&] { return empty_of({batch, heads, seqlen}, scores.options()); };
  const c10::SymInt lists =
      far_lists_group > 0 ? far_lists_size<c10::SymInt>(batch, heads, seqlen, topk + num_sinks) : c10::SymInt(0);
  return {values(),  values(),  int32_of({batch, seqlen}, scores), indices(), indices(),
          indices(), indices(), int32_of({lists}, scores)};
}

struct SelectRowsFunction : torch::autograd::Function<SelectRowsFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& scores, int64_t topk, int64_t window_size,
                               int64_t num_sinks, std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens,
                               int64_t far_lists_group) {
    ctx->set_materialize_grads(false);
    const BelowAutograd below;
    const auto [row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, far_lists] =
        call_select_rows(scores, topk, window_size, num_sinks, pool_size, cu_seqlens, far_lists_group);
    ctx->mark_non_differentiable({tau, window_begin, far_begin, far_end, frac_begin, frac_end, far_lists});
    return {row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, far_lists};
  }
  // attention_backward writes 0 for rows that are nowhere fractional, sinks among them.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor dscores = grads[0].defined() ? grads[0].transpose(1, 2) : Tensor();
    return {dscores, {}, {}, {}, {}, {}, {}};
  }
};

Tensors8 select_rows_autograd(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                              std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens,
                              int64_t far_lists_group) {
  const variable_list out =
      SelectRowsFunction::apply(scores, topk, window_size, num_sinks, pool_size, cu_seqlens, far_lists_group);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

Tensor checked_cu_seqlens_cpu(const Tensor& cu_seqlens, c10::SymInt seqlen) {
  check_cu_seqlens_values(cu_seqlens, seqlen.guard_int(__FILE__, __LINE__));
  return cu_seqlens.clone();
}

Tensor checked_cu_seqlens_meta(const Tensor& cu_seqlens, c10::SymInt seqlen) {
  return empty_of({cu_seqlens.sym_size(0)}, cu_seqlens.options());
}

}  // namespace

Tensors8 call_select_rows(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                          std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens, int64_t far_lists_group) {
  static const auto operation = find_operation<decltype(select_rows_cpu)>("sparsek::_select_rows");
  return operation.call(scores, topk, window_size, num_sinks, pool_size, cu_seqlens, far_lists_group);
}

MaybeTensor place_cu_seqlens(const MaybeTensor& cu_seqlens, const Tensor& like) {
  if (!given(cu_seqlens) || cu_seqlens->device() == like.device()) return cu_seqlens;
  static const auto operation = find_operation<decltype(checked_cu_seqlens_meta)>("sparsek::_checked_cu_seqlens");
  return operation.call(*cu_seqlens, like.sym_size(1)).to(like.device());
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("_select_rows", select_rows_cpu);
  m.impl("_checked_cu_seqlens", checked_cu_seqlens_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("_select_rows", select_rows_meta);
  m.impl("_checked_cu_seqlens", checked_cu_seqlens_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("_select_rows", select_rows_autograd);
  m.impl("_checked_cu_seqlens", torch::CppFunction::makeFallthrough());
}

}  // namespace sparsek::ops
