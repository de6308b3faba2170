// decode_step: one token per batch row in constant memory, the state changed in place (section 6). No gradient.
#include "kernels/cpu/decode/decode_step.h"

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "ops/autocast.h"
#include "ops/ops.h"
#include "ops/state.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

Tensor allocate(const Tensor& q) {
  return empty_of({q.sym_size(0), q.sym_size(1), q.sym_size(2), q.sym_size(3)}, q.options());
}

Tensor decode_step_meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& state_k,
                        const Tensor& state_v, const MaybeTensor& ring_k, const Tensor& ring_scores,
                        const MaybeTensor& ring_mass, const Tensor& slot_scores, const Tensor& slot_positions,
                        const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                        int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                        std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                        bool delayed_scores) {
  return allocate(q);
}

Tensor decode_step_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& state_k,
                       const Tensor& state_v, const MaybeTensor& ring_k, const Tensor& ring_scores,
                       const MaybeTensor& ring_mass, const Tensor& slot_scores, const Tensor& slot_positions,
                       const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                       int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                       std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                       bool delayed_scores) {
  check_attention({q, k, &v, &scores, q_far, k_far});
  TORCH_CHECK_VALUE(q.size(1) == 1, "q must be [batch, 1, num_heads, head_dim]: one token per batch row, got ",
                    q.sizes());
  check_window(window_size, num_sinks);
  check_gate(gate);
  const int64_t pool = check_selection(topk, pool_size);
  TORCH_CHECK_VALUE(pool > 0, "decode_step needs a pool_size larger than topk = ", topk,
                    ": its state has a fixed size, got 0 (no limit)");
  const Tensor* mass = given(ring_mass) ? &*ring_mass : nullptr;
  check_state({.k = state_k,
               .v = &state_v,
               .ring_k = ring_k,
               .ring_scores = &ring_scores,
               .ring_mass = mass,
               .slot_scores = &slot_scores,
               .slot_positions = &slot_positions,
               .pool_scores = &pool_scores,
               .lengths = lengths},
              q, k, given(q_far), topk, window_size, num_sinks, pool);
  const auto check_contiguous = [](const char* name, const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  };
  check_contiguous("state_k", state_k);
  check_contiguous("state_v", state_v);
  if (given(ring_k)) check_contiguous("ring_k", *ring_k);
  check_contiguous("ring_scores", ring_scores);
  if (mass != nullptr) check_contiguous("ring_mass", *mass);
  check_contiguous("slot_scores", slot_scores);
  check_contiguous("slot_positions", slot_positions);
  check_contiguous("pool_scores", pool_scores);
  check_contiguous("lengths", lengths);
  check_lengths_values(lengths);

  const Tensor new_scores = scores.select(1, 0).contiguous();
  const Tensor out = allocate(q);
  DecodeStepParams params{};
  params.dtype = dtype_of(q);
  params.q = q.const_data_ptr();
  params.q_far = data_or_null<void>(q_far);
  params.k = k.const_data_ptr();
  params.k_far = data_or_null<void>(k_far);
  params.v = v.const_data_ptr();
  params.state_k = state_k.data_ptr();
  params.state_v = state_v.data_ptr();
  params.ring_k = data_or_null<void>(ring_k);
  params.slot_scores = slot_scores.data_ptr();
  params.slot_positions = slot_positions.data_ptr<int64_t>();
  params.pool_scores = pool_scores.data_ptr();
  params.ring_mass = data_or_null<void>(ring_mass);
  params.lengths = lengths.data_ptr<int64_t>();
  params.out = out.data_ptr();
  params.q_stride_batch = q.stride(0);
  params.q_stride_head = q.stride(2);
  params.k_stride_batch = k.stride(0);
  params.k_stride_head = k.stride(2);
  params.v_stride_batch = v.stride(0);
  params.v_stride_head = v.stride(2);
  if (given(q_far)) {
    params.q_far_stride_batch = q_far->stride(0);
    params.q_far_stride_head = q_far->stride(2);
    params.k_far_stride_batch = k_far->stride(0);
    params.k_far_stride_head = k_far->stride(2);
  }
  params.batch = checked_int32("batch", q.size(0));
  params.num_heads = checked_int32("num_heads", q.size(2));
  params.num_kv_heads = checked_int32("num_kv_heads", k.size(2));
  params.head_dim = checked_int32("head_dim", q.size(3));
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = static_cast<int32_t>(pool);
  params.gate = gate_of(gate);
  params.softmax_scale = scale_or_default(softmax_scale, q);
  if (delayed_scores) {  // final when the key leaves the window
    params.candidate_scores = new_scores.const_data_ptr();
  } else {
    params.scores = new_scores.const_data_ptr();
    params.ring_scores = ring_scores.data_ptr();
  }
  cpu::decode_step(params);
  return out;
}

Tensor call_decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& state_k,
                        const Tensor& state_v, const MaybeTensor& ring_k, const Tensor& ring_scores,
                        const MaybeTensor& ring_mass, const Tensor& slot_scores, const Tensor& slot_positions,
                        const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                        int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                        std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                        bool delayed_scores) {
  static const auto operation = find_operation<decltype(decode_step_cpu)>("sparsek::decode_step");
  return operation.call(q, k, v, scores, state_k, state_v, ring_k, ring_scores, ring_mass, slot_scores, slot_positions,
                        pool_scores, lengths, topk, window_size, num_sinks, pool_size, gate, softmax_scale, q_far,
                        k_far, delayed_scores);
}

Tensor decode_step_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                            const Tensor& state_k, const Tensor& state_v, const MaybeTensor& ring_k,
                            const Tensor& ring_scores, const MaybeTensor& ring_mass, const Tensor& slot_scores,
                            const Tensor& slot_positions, const Tensor& pool_scores, const Tensor& lengths,
                            int64_t topk, int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size,
                            std::string_view gate, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                            const MaybeTensor& k_far, bool delayed_scores) {
  const MaybeTensor no_tensor;
  bool requires_grad = false;
  for (const Tensor* tensor : {&q, &k, &v, &scores, &state_k, &state_v, &ring_scores, &slot_scores, &pool_scores}) {
    requires_grad = requires_grad || tensor->requires_grad();
  }
  for (const MaybeTensor* tensor : {&ring_k, &ring_mass, &q_far, &k_far}) {
    requires_grad = requires_grad || (given(*tensor) && (*tensor)->requires_grad());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!requires_grad || !at::GradMode::is_enabled(),
                              "decode_step changes its state in place and has no gradient, but an input requires one: "
                              "call it under torch.no_grad(), or use attention_chunk");
  const Tensor out = [&] {
    const BelowAutograd below;
    return call_decode_step(q, k, v, scores, state_k, state_v, ring_k, ring_scores, ring_mass, slot_scores,
                            slot_positions, pool_scores, lengths, topk, window_size, num_sinks, pool_size, gate,
                            softmax_scale, q_far, k_far, delayed_scores);
  }();
  // Tell autograd that graphs which saved the old state are stale.
  for (const Tensor* tensor :
       {&state_k, &state_v, &ring_scores, &slot_scores, &slot_positions, &pool_scores, &lengths}) {
    if (!tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  }
  for (const MaybeTensor* tensor : {&ring_k, &ring_mass}) {
    if (given(*tensor) && !(*tensor)->is_inference()) (*tensor)->unsafeGetTensorImpl()->bump_version();
  }
  return out;
}

template <c10::DeviceType device>
Tensor decode_step_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                            const Tensor& state_k, const Tensor& state_v, const MaybeTensor& ring_k,
                            const Tensor& ring_scores, const MaybeTensor& ring_mass, const Tensor& slot_scores,
                            const Tensor& slot_positions, const Tensor& pool_scores, const Tensor& lengths,
                            int64_t topk, int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size,
                            std::string_view gate, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                            const MaybeTensor& k_far, bool delayed_scores) {
  const Autocast<device> cast;
  return call_decode_step(cast(q), cast(k), cast(v), scores, state_k, state_v, ring_k, ring_scores, ring_mass,
                          slot_scores, slot_positions, pool_scores, lengths, topk, window_size, num_sinks, pool_size,
                          gate, softmax_scale, cast(q_far), cast(k_far), delayed_scores);
}

}  // namespace

Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, AttentionState& state,
                   const AttentionOptions& options, const MaybeTensor& q_far, const MaybeTensor& k_far) {
  const auto maybe = [](const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : MaybeTensor(); };
  return call_decode_step(q, k, v, scores, state.k, state.v, maybe(state.ring_k), state.ring_scores,
                          maybe(state.ring_mass), state.slot_scores, state.slot_positions, state.pool_scores,
                          state.lengths, options.topk, options.window_size, options.num_sinks, options.pool_size,
                          options.gate, options.softmax_scale, q_far, k_far, options.delayed_scores);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("decode_step", decode_step_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("decode_step", decode_step_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("decode_step", decode_step_autograd);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCPU, m) {
  m.impl("decode_step", decode_step_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCUDA, m) {
  m.impl("decode_step", decode_step_autocast<at::kCUDA>);
}

}  // namespace sparsek::ops
