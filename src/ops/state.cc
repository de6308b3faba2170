// The carried state: creation, size, checks, and reading its ring (section 6).
#include "ops/state.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "ops/ops.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

// Tensors that the state does without are empty.
Tensors10 new_state_composite(int64_t batch, int64_t num_kv_heads, int64_t head_dim, int64_t topk, int64_t window_size,
                              int64_t num_sinks, std::optional<int64_t> pool_size, bool far_rotary, bool delayed_scores,
                              std::optional<at::ScalarType> dtype, std::optional<at::Device> device) {
  const AttentionState state = new_attention_state({.batch = batch,
                                                    .num_kv_heads = num_kv_heads,
                                                    .head_dim = head_dim,
                                                    .topk = topk,
                                                    .window_size = window_size,
                                                    .num_sinks = num_sinks,
                                                    .pool_size = pool_size,
                                                    .far_rotary = far_rotary,
                                                    .delayed_scores = delayed_scores,
                                                    .dtype = dtype.value_or(at::kBFloat16),
                                                    .device = device.value_or(at::kCPU)});
  const auto or_empty = [&](const Tensor& tensor) { return tensor.defined() ? tensor : state.k.new_empty({0}); };
  return {state.k,
          state.v,
          or_empty(state.ring_k),
          state.ring_scores,
          or_empty(state.ring_mass),
          state.slot_scores,
          state.slot_positions,
          state.pool_scores,
          state.stats,
          state.lengths};
}

Tensor leaving_mass_composite(const Tensor& ring_mass, const Tensor& lengths, int64_t window_size) {
  const Argument mass_argument{"ring_mass", ring_mass, "[batch, num_kv_heads, window_size]"};
  check_ndim(mass_argument, 3);
  check_window(window_size, 0);
  const c10::SymInt batch = ring_mass.sym_size(0), heads = ring_mass.sym_size(1);
  check_tensor(mass_argument, {batch, heads, window_size}, ring_mass.scalar_type(), mass_argument);
  check_tensor({"lengths", lengths, "[batch]"}, {batch}, at::kLong, mass_argument);
  const Tensor row = at::remainder(lengths, window_size).view({-1, 1, 1});
  const Tensor mass = ring_mass.gather(2, row.expand_symint({batch, heads, 1})).transpose(1, 2);
  return at::log(mass / num_mass_queries(window_size) + kFloor);
}

}  // namespace

void check_state(const StateArguments& state, const Tensor& q, const Tensor& k, bool far_rotary, int64_t topk,
                 int64_t window_size, int64_t num_sinks, int64_t pool_size) {
  const Argument like{"q", q, ""};
  const c10::SymInt batch = q.sym_size(0), heads = k.sym_size(2), head_dim = q.sym_size(3);
  const at::ScalarType dtype = q.scalar_type(), score_dtype = scores_dtype(dtype);
  const char* rows_layout = "[batch, num_kv_heads, num_sinks + window_size + topk, head_dim]";
  check_ndim({"state_k", state.k, rows_layout}, 4);
  const c10::SymInt rows = topk >= 0 ? c10::SymInt(num_sinks + window_size + topk) : state.k.sym_size(2);
  check_tensor({"state_k", state.k, rows_layout}, {batch, heads, rows, head_dim}, dtype, like);
  TORCH_CHECK_VALUE(rows >= num_sinks + window_size, "state_k must be ", rows_layout, ": at least ",
                    num_sinks + window_size, " rows, got ", rows);
  if (state.v != nullptr) check_tensor({"state_v", *state.v, rows_layout}, {batch, heads, rows, head_dim}, dtype, like);
  TORCH_CHECK_VALUE(given(state.ring_k) == far_rotary, "ring_k must be given exactly with q_far and k_far, got ",
                    far_rotary ? "none" : "one");
  if (far_rotary) {
    check_tensor({"ring_k", *state.ring_k, "[batch, num_kv_heads, window_size, head_dim]"},
                 {batch, heads, window_size, head_dim}, dtype, like);
  }
  const char* ring_layout = "[batch, num_kv_heads, window_size]";
  const char* slot_layout = "[batch, num_kv_heads, topk]";
  if (state.ring_scores != nullptr) {
    check_tensor({"ring_scores", *state.ring_scores, ring_layout}, {batch, heads, window_size}, score_dtype, like);
  }
  if (state.ring_mass != nullptr) {
    check_tensor({"ring_mass", *state.ring_mass, ring_layout}, {batch, heads, window_size}, score_dtype, like);
  }
  if (state.slot_scores != nullptr) {
    check_tensor({"slot_scores", *state.slot_scores, slot_layout}, {batch, heads, topk}, score_dtype, like);
  }
  if (state.slot_positions != nullptr) {
    check_tensor({"slot_positions", *state.slot_positions, slot_layout}, {batch, heads, topk}, at::kLong, like);
  }
  if (state.pool_scores != nullptr) {
    const Argument pool{"pool_scores", *state.pool_scores, "[batch, num_kv_heads, pool_size]"};
    check_ndim(pool, 3);
    check_tensor(pool, {batch, heads, pool_size > 0 ? c10::SymInt(pool_size) : pool.tensor.sym_size(2)}, score_dtype,
                 like);
  }
  check_tensor({"lengths", state.lengths, "[batch]"}, {batch}, at::kLong, like);
}

Tensor ring_order(const Tensor& lengths, int64_t window_size) {
  return at::remainder(lengths.unsqueeze(1) + at::arange(window_size, lengths.options()), window_size);
}

Tensor ring_in_order(const Tensor& ring, const Tensor& order) {
  return ring.gather(2, order.unsqueeze(1).expand_as(ring));
}

// Ring row r holds the last position below length + chunk that is r modulo window_size.
Tensor new_ring(const Tensor& values, const Tensor& lengths, const c10::SymInt& chunk, int64_t window_size) {
  const Tensor last = lengths.unsqueeze(1) + at::Scalar(chunk - 1);
  const Tensor back = at::remainder(last - at::arange(window_size, lengths.options()), window_size);
  const Tensor source = at::rsub(back, at::Scalar(chunk + (window_size - 1)));
  return values.gather(2, source.unsqueeze(1).expand_symint({values.sym_size(0), values.sym_size(1), window_size}));
}

Tensor take_rows(const Tensor& rows, const Tensor& source) {
  return rows.flatten(0, 2)
      .index_select(0, source.flatten())
      .view_symint({source.sym_size(0), source.sym_size(1), source.sym_size(2), rows.sym_size(3)});
}

Tensor take_rows_of_every_head(const Tensor& state, const Tensor& index) {
  const c10::SymInt batch = state.sym_size(0), heads = state.sym_size(1);
  const Tensor first = at::arange(at::Scalar(batch * heads), index.options()) * at::Scalar(state.sym_size(2));
  return take_rows(state, first.view_symint({batch, 1, heads}) + index.unsqueeze(2));
}

AttentionState new_attention_state(const AttentionStateOptions& o) {
  check_window(o.window_size, o.num_sinks);
  const int64_t pool_size = check_selection(o.topk, o.pool_size);
  TORCH_CHECK_VALUE(o.batch >= 1 && o.num_kv_heads >= 1 && o.head_dim >= 8 && o.head_dim <= 256 && o.head_dim % 8 == 0,
                    "a state needs batch and num_kv_heads of at least 1 and a head_dim that is a multiple of 8 up to "
                    "256, got ",
                    o.batch, ", ", o.num_kv_heads, ", ", o.head_dim);
  const at::TensorOptions values = at::TensorOptions().dtype(o.dtype).device(o.device);
  const at::TensorOptions scores = values.dtype(scores_dtype(o.dtype)), integers = values.dtype(at::kLong);
  AttentionState state;
  state.k = at::zeros({o.batch, o.num_kv_heads, o.num_sinks + o.window_size + o.topk, o.head_dim}, values);
  state.v = at::zeros_like(state.k);
  if (o.far_rotary) state.ring_k = at::zeros({o.batch, o.num_kv_heads, o.window_size, o.head_dim}, values);
  state.ring_scores = at::zeros({o.batch, o.num_kv_heads, o.window_size}, scores);
  if (o.delayed_scores) state.ring_mass = at::zeros_like(state.ring_scores);
  state.slot_scores = at::zeros({o.batch, o.num_kv_heads, o.topk}, scores);
  state.slot_positions = at::full({o.batch, o.num_kv_heads, o.topk}, -1, integers);
  state.pool_scores = at::full({o.batch, o.num_kv_heads, pool_size > 0 ? pool_size : o.topk},
                               -std::numeric_limits<double>::infinity(), scores);
  state.stats = at::zeros({o.batch, o.num_kv_heads, 3}, values.dtype(at::kDouble));
  state.lengths = at::zeros({o.batch}, integers);
  return state;
}

int64_t size_in_bytes(const AttentionState& state) {
  int64_t bytes = 0;
  for (const Tensor* tensor :
       {&state.k, &state.v, &state.ring_k, &state.ring_scores, &state.ring_mass, &state.slot_scores,
        &state.slot_positions, &state.pool_scores, &state.stats, &state.lengths}) {
    if (tensor->defined()) bytes += static_cast<int64_t>(tensor->nbytes());
  }
  return bytes;
}

AttentionState join(const std::vector<AttentionState>& states) {
  TORCH_CHECK_VALUE(!states.empty(), "join: expected at least one state, got none");
  const auto rows = [&](Tensor AttentionState::* member) {
    if (!(states.front().*member).defined()) return Tensor();
    std::vector<Tensor> parts;
    for (const AttentionState& state : states) parts.push_back(state.*member);
    return at::cat(parts, 0);
  };
  return {.k = rows(&AttentionState::k),
          .v = rows(&AttentionState::v),
          .ring_k = rows(&AttentionState::ring_k),
          .ring_scores = rows(&AttentionState::ring_scores),
          .ring_mass = rows(&AttentionState::ring_mass),
          .slot_scores = rows(&AttentionState::slot_scores),
          .slot_positions = rows(&AttentionState::slot_positions),
          .pool_scores = rows(&AttentionState::pool_scores),
          .stats = rows(&AttentionState::stats),
          .lengths = rows(&AttentionState::lengths)};
}

Tensor leaving_mass(const AttentionState& state, const AttentionOptions& options) {
  TORCH_CHECK_VALUE(state.ring_mass.defined(), "the state has no ring_mass: create it with delayed_scores");
  return leaving_mass_composite(state.ring_mass, state.lengths, options.window_size);
}

TORCH_LIBRARY_IMPL(sparsek, CompositeImplicitAutograd, m) {
  m.impl("new_state", new_state_composite);
  m.impl("leaving_mass", leaving_mass_composite);
}

}  // namespace sparsek::ops
