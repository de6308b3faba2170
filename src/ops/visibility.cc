// _visibility, _chunk_visibility and _window_rows: from a selection to the row arrays that attention reads
// (kernels/params.h "Rows"). Only row_scores has a gradient: it is scores, transposed, with +inf for sinks.
#include "kernels/cpu/select/visibility.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/cpu/select/chunk_visibility.h"
#include "ops/checks.h"
#include "ops/row_params.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
           const Tensor& frac_end, int64_t window_size, int64_t num_sinks, const MaybeTensor& cu_seqlens) {
  check_scores("scores", scores);
  const Argument like{"scores", scores, ""};
  const auto sizes = scores.sym_sizes();
  const char* layout = "[batch, seqlen, num_kv_heads]";
  check_tensor({"tau", tau, layout}, {sizes[0], sizes[1], sizes[2]}, scores.scalar_type(), like);
  check_tensor({"expiry", expiry, layout}, {sizes[0], sizes[1], sizes[2]}, at::kInt, like);
  check_tensor({"frac_begin", frac_begin, layout}, {sizes[0], sizes[1], sizes[2]}, at::kInt, like);
  check_tensor({"frac_end", frac_end, layout}, {sizes[0], sizes[1], sizes[2]}, at::kInt, like);
  check_cu_seqlens(cu_seqlens, "scores", scores);
  check_window(window_size, num_sinks);
}

int32_t num_documents(const MaybeTensor& cu_seqlens) {
  return given(cu_seqlens) ? checked_int32("documents", cu_seqlens->size(0) - 1) : 1;
}

Tensors7 allocate(const Tensor& scores) {
  const c10::SymInt batch = scores.sym_size(0), seqlen = scores.sym_size(1), heads = scores.sym_size(2);
  const auto indices = [&] { return int32_of({batch, heads, seqlen}, scores); };
  return {empty_of({batch, heads, seqlen}, scores.options()),
          empty_of({batch, heads, seqlen}, scores.options()),
          int32_of({batch, seqlen}, scores),
          indices(),
          indices(),
          indices(),
          indices()};
}

Tensors7 visibility_meta(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                         const Tensor& frac_end, int64_t window_size, int64_t num_sinks,
                         const MaybeTensor& cu_seqlens) {
  check(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
  return allocate(scores);
}

Tensors7 visibility_cpu(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                        const Tensor& frac_end, int64_t window_size, int64_t num_sinks, const MaybeTensor& cu_seqlens) {
  check(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
  check_cu_seqlens_values(cu_seqlens, scores.size(1));
  const Tensor ends = expiry.contiguous(), begins = frac_begin.contiguous(), frac_ends = frac_end.contiguous();
  Tensors7 outputs = allocate(scores);
  cpu::visibility(visibility_params(dtype_of(scores), scores, tau, ends, begins, frac_ends,
                                    data_or_null<int32_t>(cu_seqlens), num_documents(cu_seqlens), window_size,
                                    num_sinks, outputs, checked_int32));
  return outputs;
}

struct VisibilityFunction : torch::autograd::Function<VisibilityFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& scores, const Tensor& tau, const Tensor& expiry,
                               const Tensor& frac_begin, const Tensor& frac_end, int64_t window_size, int64_t num_sinks,
                               const MaybeTensor& cu_seqlens) {
    ctx->set_materialize_grads(false);
    const BelowAutograd below;
    const auto [row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end] =
        call_visibility(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
    ctx->mark_non_differentiable({row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end});
    return {row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end};
  }
  // attention_backward writes 0 for rows that are nowhere fractional, sinks among them.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor dscores = grads[0].defined() ? grads[0].transpose(1, 2) : Tensor();
    return {dscores, {}, {}, {}, {}, {}, {}, {}};
  }
};

Tensors7 visibility_autograd(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                             const Tensor& frac_end, int64_t window_size, int64_t num_sinks,
                             const MaybeTensor& cu_seqlens) {
  const variable_list out =
      VisibilityFunction::apply(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

Tensors8 allocate_chunk(const Tensor& lengths, const Tensor& new_slot_source, const Tensor& pool_frac_begin,
                        const Tensor& arrival_expiry, int64_t window_size, int64_t num_sinks) {
  const c10::SymInt batch = arrival_expiry.sym_size(0), heads = arrival_expiry.sym_size(1),
                    chunk = arrival_expiry.sym_size(2), carried = new_slot_source.sym_size(2) + num_sinks + window_size,
                    rows = carried + chunk, pool = pool_frac_begin.sym_size(2);
  return {int32_of({batch, chunk}, lengths),
          int32_of({batch, heads, rows}, lengths),
          int32_of({batch, heads, rows}, lengths),
          int32_of({batch, heads, pool + rows}, lengths),
          int32_of({batch, heads, pool + rows}, lengths),
          empty_of({batch, rows}, lengths.options().dtype(at::kBool)),
          int64_of({batch, carried, heads}, lengths),
          int64_of({batch, heads, carried}, lengths)};
}

Tensors8 chunk_visibility_meta(const Tensor& lengths, const Tensor& slot_expiry, const Tensor& slot_frac_begin,
                               const Tensor& slot_frac_end, const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                               const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                               const Tensor& arrival_frac_end, const Tensor& new_slot_source, int64_t window_size,
                               int64_t num_sinks) {
  return allocate_chunk(lengths, new_slot_source, pool_frac_begin, arrival_expiry, window_size, num_sinks);
}

Tensors8 chunk_visibility_cpu(const Tensor& lengths, const Tensor& slot_expiry, const Tensor& slot_frac_begin,
                              const Tensor& slot_frac_end, const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                              const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                              const Tensor& arrival_frac_end, const Tensor& new_slot_source, int64_t window_size,
                              int64_t num_sinks) {
  check_window(window_size, num_sinks);
  const Argument like{"lengths", lengths, ""};
  check_ndim({"arrival_expiry", arrival_expiry, "[batch, num_kv_heads, chunk]"}, 3);
  check_ndim({"new_slot_source", new_slot_source, "[batch, num_kv_heads, topk]"}, 3);
  check_ndim({"pool_frac_begin", pool_frac_begin, "[batch, num_kv_heads, pool_capacity]"}, 3);
  const int64_t batch = arrival_expiry.size(0), heads = arrival_expiry.size(1), chunk = arrival_expiry.size(2),
                topk = new_slot_source.size(2), pool = pool_frac_begin.size(2);
  const auto check_indices = [&](const char* name, const Tensor& tensor, int64_t size) {
    check_tensor({name, tensor, "[batch, num_kv_heads, size]"}, {batch, heads, size}, at::kInt, like, true);
  };
  check_tensor({"lengths", lengths, "[batch]"}, {batch}, at::kLong, like, true);
  check_lengths_values(lengths);
  check_indices("slot_expiry", slot_expiry, topk);
  check_indices("slot_frac_begin", slot_frac_begin, topk);
  check_indices("slot_frac_end", slot_frac_end, topk);
  check_indices("pool_frac_begin", pool_frac_begin, pool);
  check_indices("pool_frac_end", pool_frac_end, pool);
  check_indices("arrival_expiry", arrival_expiry, chunk);
  check_indices("arrival_frac_begin", arrival_frac_begin, chunk);
  check_indices("arrival_frac_end", arrival_frac_end, chunk);
  check_indices("new_slot_source", new_slot_source, topk);
  Tensors8 outputs = allocate_chunk(lengths, new_slot_source, pool_frac_begin, arrival_expiry, window_size, num_sinks);
  cpu::chunk_visibility(chunk_visibility_params(lengths, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin,
                                                pool_frac_end, arrival_expiry, arrival_frac_begin, arrival_frac_end,
                                                new_slot_source, window_size, num_sinks, outputs, checked_int32));
  return outputs;
}

Tensors4 allocate_window(const Tensor& q, const MaybeTensor& lengths, int64_t window_size, int64_t num_sinks) {
  const c10::SymInt batch = q.sym_size(0), seqlen = q.sym_size(1);
  const c10::SymInt rows = given(lengths) ? seqlen + num_sinks + window_size : seqlen;
  return {int32_of({batch, seqlen}, q), int32_of({batch, rows}, q), int32_of({batch, rows}, q),
          int32_of({batch, given(lengths) ? c10::SymInt(0) : seqlen}, q)};
}

Tensors4 window_rows_meta(const Tensor& q, const MaybeTensor& lengths, const MaybeTensor& cu_seqlens,
                          int64_t window_size, int64_t num_sinks) {
  return allocate_window(q, lengths, window_size, num_sinks);
}

Tensors4 window_rows_cpu(const Tensor& q, const MaybeTensor& lengths, const MaybeTensor& cu_seqlens,
                         int64_t window_size, int64_t num_sinks) {
  check_window(window_size, num_sinks);
  check_cu_seqlens(cu_seqlens, "q", q);
  check_cu_seqlens_values(cu_seqlens, q.size(1));
  if (given(lengths)) {
    check_tensor({"lengths", *lengths, "[batch]"}, {q.size(0)}, at::kLong, {"q", q, ""}, true);
    check_lengths_values(*lengths);
  }
  Tensors4 outputs = allocate_window(q, lengths, window_size, num_sinks);
  cpu::window_rows(window_rows_params(q, data_or_null<int64_t>(lengths), data_or_null<int32_t>(cu_seqlens),
                                      num_documents(cu_seqlens), window_size, num_sinks, outputs, checked_int32));
  return outputs;
}

}  // namespace

Tensors7 call_visibility(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                         const Tensor& frac_end, int64_t window_size, int64_t num_sinks,
                         const MaybeTensor& cu_seqlens) {
  static const auto operation = find_operation<decltype(visibility_cpu)>("sparsek::_visibility");
  return operation.call(scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, cu_seqlens);
}

Tensors8 call_chunk_visibility(const Tensor& lengths, const Tensor& slot_expiry, const Tensor& slot_frac_begin,
                               const Tensor& slot_frac_end, const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                               const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                               const Tensor& arrival_frac_end, const Tensor& new_slot_source, int64_t window_size,
                               int64_t num_sinks) {
  static const auto operation = find_operation<decltype(chunk_visibility_cpu)>("sparsek::_chunk_visibility");
  return operation.call(lengths, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end,
                        arrival_expiry, arrival_frac_begin, arrival_frac_end, new_slot_source, window_size, num_sinks);
}

Tensors4 call_window_rows(const Tensor& q, const MaybeTensor& lengths, const MaybeTensor& cu_seqlens,
                          int64_t window_size, int64_t num_sinks) {
  static const auto operation = find_operation<decltype(window_rows_cpu)>("sparsek::_window_rows");
  return operation.call(q, lengths, cu_seqlens, window_size, num_sinks);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("_visibility", visibility_cpu);
  m.impl("_chunk_visibility", chunk_visibility_cpu);
  m.impl("_window_rows", window_rows_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("_visibility", visibility_meta);
  m.impl("_chunk_visibility", chunk_visibility_meta);
  m.impl("_window_rows", window_rows_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("_visibility", visibility_autograd);
  m.impl("_chunk_visibility", torch::CppFunction::makeFallthrough());
  m.impl("_window_rows", torch::CppFunction::makeFallthrough());
}

}  // namespace sparsek::ops
