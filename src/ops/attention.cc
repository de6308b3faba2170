// attention and attention_forward, for whole sequences: eq. 3-9. Both are made of differentiable operations
// (_select_rows or _visibility, _attention_rows), so nothing here knows about gradients. A GPU wants lists of far rows
// beside the rows, which selection writes in passing.
#include <ATen/Context.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const MaybeTensor& q_far,
           const MaybeTensor& k_far, const MaybeTensor& cu_seqlens, int64_t window_size, int64_t num_sinks,
           std::string_view gate) {
  check_attention({q, k, &v, &scores, q_far, k_far});
  check_cu_seqlens(cu_seqlens, "q", q);
  check_window(window_size, num_sinks);
  check_gate(gate);
}

std::optional<int64_t> max_far(std::optional<int64_t> topk, int64_t num_sinks) {
  return topk.has_value() ? std::optional<int64_t>(*topk + num_sinks) : std::nullopt;
}

Tensors2 attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& tau,
                           const Tensor& expiry, const Tensor& frac_begin, const Tensor& frac_end, int64_t window_size,
                           int64_t num_sinks, std::string_view gate, std::optional<double> softmax_scale,
                           const MaybeTensor& q_far, const MaybeTensor& k_far, const MaybeTensor& cu_seqlens,
                           bool deterministic, std::optional<int64_t> topk) {
  check(q, k, v, scores, q_far, k_far, cu_seqlens, window_size, num_sinks, gate);
  TORCH_CHECK_VALUE(topk.has_value() || !q.is_cuda(),
                    "topk must be given to attention_forward on a GPU: its memory is laid out by it");
  if (topk.has_value()) check_selection(*topk, {});
  const auto [row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end] = call_visibility(
      scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks, place_cu_seqlens(cu_seqlens, q));
  return call_attention_rows(q, k, v, q_far, k_far, row_scores, row_tau, window_begin, far_begin, far_end,
                             row_frac_begin, row_frac_end, gate, scale_or_default(softmax_scale, q),
                             deterministic || at::globalContext().deterministicAlgorithms(), max_far(topk, num_sinks),
                             {});
}

Tensors2 attention_composite(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, int64_t topk,
                             int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size,
                             std::string_view gate, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                             const MaybeTensor& k_far, const MaybeTensor& cu_seqlens, bool deterministic) {
  check(q, k, v, scores, q_far, k_far, cu_seqlens, window_size, num_sinks, gate);
  check_selection(topk, pool_size);
  const int64_t group = (q.sym_size(2) / k.sym_size(2)).guard_int(__FILE__, __LINE__);
  const auto [row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, far_lists] = call_select_rows(
      scores, topk, window_size, num_sinks, pool_size, place_cu_seqlens(cu_seqlens, q), q.is_cuda() ? group : 0);
  return call_attention_rows(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin,
                             frac_end, gate, scale_or_default(softmax_scale, q),
                             deterministic || at::globalContext().deterministicAlgorithms(), max_far(topk, num_sinks),
                             far_lists);
}

template <c10::DeviceType device>
Tensors2 attention_forward_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                                    const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                                    const Tensor& frac_end, int64_t window_size, int64_t num_sinks,
                                    std::string_view gate, std::optional<double> softmax_scale,
                                    const MaybeTensor& q_far, const MaybeTensor& k_far, const MaybeTensor& cu_seqlens,
                                    bool deterministic, std::optional<int64_t> topk) {
  const Autocast<device> cast;
  static const auto operation = find_operation<decltype(attention_forward)>("sparsek::attention_forward");
  return operation.call(cast(q), cast(k), cast(v), scores, tau, expiry, frac_begin, frac_end, window_size, num_sinks,
                        gate, softmax_scale, cast(q_far), cast(k_far), cu_seqlens, deterministic, topk);
}

Tensors2 call_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, int64_t topk,
                        int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                        std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                        const MaybeTensor& cu_seqlens, bool deterministic) {
  static const auto operation = find_operation<decltype(attention_composite)>("sparsek::attention");
  return operation.call(q, k, v, scores, topk, window_size, num_sinks, pool_size, gate, softmax_scale, q_far, k_far,
                        cu_seqlens, deterministic);
}

template <c10::DeviceType device>
Tensors2 attention_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, int64_t topk,
                            int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size,
                            std::string_view gate, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                            const MaybeTensor& k_far, const MaybeTensor& cu_seqlens, bool deterministic) {
  const Autocast<device> cast;
  return call_attention(cast(q), cast(k), cast(v), scores, topk, window_size, num_sinks, pool_size, gate, softmax_scale,
                        cast(q_far), cast(k_far), cu_seqlens, deterministic);
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                                     int64_t topk, int64_t window_size, int64_t num_sinks,
                                     std::optional<int64_t> pool_size, std::string_view gate,
                                     std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                     const MaybeTensor& k_far, const MaybeTensor& cu_seqlens, bool deterministic) {
  return call_attention(q, k, v, scores, topk, window_size, num_sinks, pool_size, gate, softmax_scale, q_far, k_far,
                        cu_seqlens, deterministic);
}

TORCH_LIBRARY_IMPL(sparsek, CompositeImplicitAutograd, m) {
  m.impl("attention", attention_composite);
  m.impl("attention_forward", attention_forward);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCPU, m) {
  m.impl("attention", attention_autocast<at::kCPU>);
  m.impl("attention_forward", attention_forward_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCUDA, m) {
  m.impl("attention", attention_autocast<at::kCUDA>);
  m.impl("attention_forward", attention_forward_autocast<at::kCUDA>);
}

}  // namespace sparsek::ops
