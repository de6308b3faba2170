// decode_step on the GPU: one token per batch row, the state changed in place (section 6).
#include "kernels/cuda/decode/decode_step.h"

#include <cmath>

#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, const Tensor& state_k,
                   const Tensor& state_v, const MaybeTensor& ring_k, const Tensor& ring_scores,
                   const MaybeTensor& ring_mass, const Tensor& slot_scores, const Tensor& slot_positions,
                   const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                   int64_t num_sinks, std::optional<int64_t> pool_size, Gate gate, std::optional<double> softmax_scale,
                   const MaybeTensor& q_far, const MaybeTensor& k_far, bool delayed_scores) {
  const Argument like{"q", q, "[batch, 1, num_heads, head_dim]"};
  const char* key = "[batch, 1, num_kv_heads, head_dim]";
  check_ndim(like, 4);
  check_ndim({"k", k, key}, 4);
  const DType dtype = check_half(like);
  const int64_t batch = q.size(0), num_heads = q.size(2), head_dim = q.size(3), heads = k.size(2);
  check_value(q.size(1) == 1, "q must be [batch, 1, num_heads, head_dim]: one token per batch row, got ",
              shape_text(q));
  const auto check = [&](const Argument& argument, int64_t count) {
    check_tensor(argument, {batch, 1, count, head_dim}, q.scalar_type(), like);
    check_rows_of_16_bytes(argument);
  };
  check(like, num_heads);
  check({"k", k, key}, heads);
  check({"v", v, key}, heads);
  const bool far = given(q_far);
  check_value(far == given(k_far), "q_far and k_far must be given together");
  if (far) {
    check({"q_far", *q_far, like.layout}, num_heads);
    check({"k_far", *k_far, key}, heads);
  }
  check_value(head_dim == 64 || head_dim == 128, "head_dim must be 64 or 128 on a GPU, got ", head_dim);
  check_value(batch >= 1 && heads >= 1 && num_heads % heads == 0 && num_heads <= 64 * heads,
              "num_heads must be a multiple of num_kv_heads, at most 64 times, got ", num_heads, " and ", heads);
  check_tensor({"scores", scores, "[batch, 1, num_kv_heads]"}, {batch, 1, heads}, ScalarType::Float, like);
  check_window(window_size, num_sinks);
  const int64_t pool = check_selection(topk, pool_size);
  check_value(pool > 0, "decode_step needs a pool_size larger than topk = ", topk,
              ": its state has a fixed size, got 0 (no limit)");
  check_value(!softmax_scale.has_value() || std::isfinite(*softmax_scale), "softmax_scale must be finite, got ",
              softmax_scale.value_or(0));

  const int64_t rows = num_sinks + window_size + topk;
  const auto check_state = [&](const char* name, const Tensor& tensor, const char* layout,
                               std::initializer_list<int64_t> sizes, ScalarType element) {
    check_tensor({name, tensor, layout}, sizes, element, like);
    check_contiguous({name, tensor, layout});
  };
  // Their rows are read and written 16 bytes at a time.
  const auto check_rows_state = [&](const char* name, const Tensor& tensor, const char* layout, int64_t count) {
    check_state(name, tensor, layout, {batch, heads, count, head_dim}, q.scalar_type());
    check_rows_of_16_bytes({name, tensor, layout});
  };
  const char* rows_layout = "[batch, num_kv_heads, num_sinks + window_size + topk, head_dim]";
  const char* ring_layout = "[batch, num_kv_heads, window_size]";
  check_rows_state("state_k", state_k, rows_layout, rows);
  check_rows_state("state_v", state_v, rows_layout, rows);
  check_value(given(ring_k) == far, "ring_k must be given exactly with q_far and k_far, got ", far ? "none" : "one");
  if (far) {
    check_rows_state("ring_k", *ring_k, "[batch, num_kv_heads, window_size, head_dim]", window_size);
  }
  check_state("ring_scores", ring_scores, ring_layout, {batch, heads, window_size}, ScalarType::Float);
  if (given(ring_mass)) {
    check_state("ring_mass", *ring_mass, ring_layout, {batch, heads, window_size}, ScalarType::Float);
  }
  check_state("slot_scores", slot_scores, "[batch, num_kv_heads, topk]", {batch, heads, topk}, ScalarType::Float);
  check_state("slot_positions", slot_positions, "[batch, num_kv_heads, topk]", {batch, heads, topk}, ScalarType::Long);
  check_state("pool_scores", pool_scores, "[batch, num_kv_heads, pool_size]", {batch, heads, pool}, ScalarType::Float);
  check_state("lengths", lengths, "[batch]", {batch}, ScalarType::Long);

  const OnDevice here(q);
  const Tensor new_scores = as_contiguous(scores), out = new_like(q);
  const Strides q_strides = row_strides(q), k_strides = row_strides(k), v_strides = row_strides(v);
  DecodeStepParams params{};
  params.dtype = dtype;
  params.q = q.const_data_ptr();
  params.q_far = data_or_null<void>(q_far);
  params.k = k.const_data_ptr();
  params.k_far = data_or_null<void>(k_far);
  params.v = v.const_data_ptr();
  if (delayed_scores) {  // final when the key leaves the window
    params.candidate_scores = new_scores.const_data_ptr();
  } else {
    params.scores = new_scores.const_data_ptr();
    params.ring_scores = ring_scores.mutable_data_ptr();
  }
  params.state_k = state_k.mutable_data_ptr();
  params.state_v = state_v.mutable_data_ptr();
  params.ring_k = far ? ring_k->mutable_data_ptr() : nullptr;
  params.slot_scores = slot_scores.mutable_data_ptr();
  params.slot_positions = data<int64_t>(slot_positions);
  params.pool_scores = pool_scores.mutable_data_ptr();
  params.ring_mass = given(ring_mass) ? ring_mass->mutable_data_ptr() : nullptr;
  params.lengths = data<int64_t>(lengths);
  params.out = out.mutable_data_ptr();
  params.q_stride_batch = q_strides.batch;
  params.q_stride_head = q_strides.head;
  params.k_stride_batch = k_strides.batch;
  params.k_stride_head = k_strides.head;
  params.v_stride_batch = v_strides.batch;
  params.v_stride_head = v_strides.head;
  if (far) {
    const Strides q_far_strides = row_strides(*q_far), k_far_strides = row_strides(*k_far);
    params.q_far_stride_batch = q_far_strides.batch;
    params.q_far_stride_head = q_far_strides.head;
    params.k_far_stride_batch = k_far_strides.batch;
    params.k_far_stride_head = k_far_strides.head;
  }
  params.batch = checked_int32("batch", batch);
  params.num_heads = checked_int32("num_heads", num_heads);
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.head_dim = checked_int32("head_dim", head_dim);
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = static_cast<int32_t>(pool);
  params.gate = gate;
  params.softmax_scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  const Tensor workspace = here.workspace(sparsek::cuda::decode_step_workspace_bytes(params));
  sparsek::cuda::decode_step(params, workspace.mutable_data_ptr(), here.stream());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
}

}  // namespace sparsek::ops::cuda
