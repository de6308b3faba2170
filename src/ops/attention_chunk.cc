// attention_chunk: eq. 12-13. The selection carries no gradient; everything else is made of differentiable operations,
// so gradients reach the carried state: keys and values through the rows, scores through the score rows.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>

#include "ops/autocast.h"
#include "ops/ops.h"
#include "ops/state.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

// Values of carried and arriving keys, in their new order; source < 0 gives `unused`.
Tensor take_scores(const Tensor& scores, const Tensor& source, double unused) {
  return at::where(source.lt(0), unused, scores.gather(2, source.clamp_min(0).to(at::kLong)));
}

Tensors10 attention_chunk_composite(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                                    const Tensor& state_k, const Tensor& state_v, const MaybeTensor& ring_k,
                                    const Tensor& ring_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                                    const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                                    int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                                    std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                    const MaybeTensor& k_far, bool delayed_scores, bool deterministic) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  check_attention({q, k, &v, &scores, q_far, k_far});
  check_window(window_size, num_sinks);
  check_gate(gate);
  const int64_t pool = check_selection(topk, pool_size);
  const bool far = given(q_far);
  check_state({.k = state_k,
               .v = &state_v,
               .ring_k = ring_k,
               .ring_scores = &ring_scores,
               .slot_scores = &slot_scores,
               .slot_positions = &slot_positions,
               .pool_scores = &pool_scores,
               .lengths = lengths},
              q, k, far, topk, window_size, num_sinks, pool);
  const c10::SymInt chunk = q.sym_size(1);
  const int64_t ring_row = topk + num_sinks;

  // Scores in row order: those of the chunk's candidates first, then of the keys that are still in the window at its
  // end.
  const Tensor order = ring_order(lengths, window_size);
  const Tensor own_scores = scores.transpose(1, 2);
  const Tensor arriving = delayed_scores ? at::cat({own_scores, at::zeros_like(ring_scores)}, 2)
                                         : at::cat({ring_in_order(ring_scores, order), own_scores}, 2);
  const Tensor candidates = arriving.slice_symint(2, 0, chunk);
  const auto [tau, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end, arrival_expiry,
              arrival_frac_begin, arrival_frac_end, new_slot_source, new_slot_positions, new_pool_source] =
      call_select_chunk(candidates.transpose(1, 2), slot_scores, slot_positions, pool_scores, lengths, topk,
                        window_size, num_sinks, pool);
  const auto [window_begin, far_begin, far_end, frac_begin, frac_end, is_sink, carried_source, state_source] =
      call_chunk_visibility(lengths, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end,
                            arrival_expiry, arrival_frac_begin, arrival_frac_end, new_slot_source, window_size,
                            num_sinks);

  // Rows [slots | sinks | ring in position order | chunk]; before them the pool's scores. Keys and values are [batch,
  // rows, num_kv_heads, head_dim], so that joining copies the chunk in one piece.
  const Tensor sink_scores =
      ring_scores.new_zeros_symint({ring_scores.sym_size(0), ring_scores.sym_size(1), num_sinks});
  const Tensor key_scores =
      at::where(is_sink.unsqueeze(1), kInfinity, at::cat({slot_scores, sink_scores, arriving}, 2));
  const Tensor rows_v = at::cat({take_rows(state_v, carried_source), v}, 1);
  const Tensor carried_k = take_rows(state_k, carried_source);
  Tensor rows_k, rows_far;
  if (far) {
    // The state holds k_far; slots and sinks are never in a window, so their rows of rows_k are never read.
    rows_far = at::cat({carried_k, *k_far}, 1);
    rows_k = at::cat({carried_k.slice(1, 0, ring_row).detach(), take_rows_of_every_head(*ring_k, order), k}, 1);
  } else {
    rows_k = at::cat({carried_k, k}, 1);
  }
  const auto [out, softmax_lse] = call_attention_rows(
      q, rows_k, rows_v, q_far, far ? MaybeTensor(rows_far) : MaybeTensor(), at::cat({pool_scores, key_scores}, 2), tau,
      window_begin, far_begin, far_end, frac_begin, frac_end, gate, scale_or_default(softmax_scale, q),
      deterministic || at::globalContext().deterministicAlgorithms(), topk + num_sinks, {});

  const Tensor new_k = take_rows(far ? rows_far : rows_k, state_source);
  const Tensor new_ring_k = far ? take_rows(rows_k, state_source.slice(2, num_sinks, num_sinks + window_size))
                                : empty_of({0}, state_k.options());
  const Tensor new_ring_scores = delayed_scores ? ring_scores.clone() : new_ring(arriving, lengths, chunk, window_size);
  return {out,
          softmax_lse,
          new_k,
          take_rows(rows_v, state_source),
          new_ring_k,
          new_ring_scores,
          take_scores(at::cat({slot_scores, candidates}, 2), new_slot_source, 0),
          new_slot_positions,
          take_scores(at::cat({pool_scores, candidates}, 2), new_pool_source, -kInfinity),
          lengths + at::Scalar(chunk)};
}

Tensors10 call_attention_chunk(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                               const Tensor& state_k, const Tensor& state_v, const MaybeTensor& ring_k,
                               const Tensor& ring_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                               const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                               int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                               std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                               bool delayed_scores, bool deterministic) {
  static const auto operation = find_operation<decltype(attention_chunk_composite)>("sparsek::attention_chunk");
  return operation.call(q, k, v, scores, state_k, state_v, ring_k, ring_scores, slot_scores, slot_positions,
                        pool_scores, lengths, topk, window_size, num_sinks, pool_size, gate, softmax_scale, q_far,
                        k_far, delayed_scores, deterministic);
}

template <c10::DeviceType device>
Tensors10 attention_chunk_autocast(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                                   const Tensor& state_k, const Tensor& state_v, const MaybeTensor& ring_k,
                                   const Tensor& ring_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                                   const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                                   int64_t num_sinks, std::optional<int64_t> pool_size, std::string_view gate,
                                   std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                   const MaybeTensor& k_far, bool delayed_scores, bool deterministic) {
  const Autocast<device> cast;
  return call_attention_chunk(cast(q), cast(k), cast(v), scores, state_k, state_v, ring_k, ring_scores, slot_scores,
                              slot_positions, pool_scores, lengths, topk, window_size, num_sinks, pool_size, gate,
                              softmax_scale, cast(q_far), cast(k_far), delayed_scores, deterministic);
}

}  // namespace

std::tuple<Tensor, Tensor, AttentionState> attention_chunk(const Tensor& q, const Tensor& k, const Tensor& v,
                                                           const Tensor& scores, const AttentionState& state,
                                                           const AttentionOptions& options, const MaybeTensor& q_far,
                                                           const MaybeTensor& k_far) {
  const MaybeTensor ring_k = state.ring_k.defined() ? MaybeTensor(state.ring_k) : MaybeTensor();
  const auto [out, softmax_lse, new_k, new_v, new_ring_k, ring_scores, slot_scores, slot_positions, pool_scores,
              lengths] =
      call_attention_chunk(q, k, v, scores, state.k, state.v, ring_k, state.ring_scores, state.slot_scores,
                           state.slot_positions, state.pool_scores, state.lengths, options.topk, options.window_size,
                           options.num_sinks, options.pool_size, options.gate, options.softmax_scale, q_far, k_far,
                           options.delayed_scores, /*deterministic=*/false);
  AttentionState next = state;
  next.k = new_k;
  next.v = new_v;
  if (ring_k.has_value()) next.ring_k = new_ring_k;
  next.ring_scores = ring_scores;
  next.slot_scores = slot_scores;
  next.slot_positions = slot_positions;
  next.pool_scores = pool_scores;
  next.lengths = lengths;
  return {out, softmax_lse, next};
}

TORCH_LIBRARY_IMPL(sparsek, CompositeImplicitAutograd, m) {
  m.impl("attention_chunk", attention_chunk_composite);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCPU, m) {
  m.impl("attention_chunk", attention_chunk_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCUDA, m) {
  m.impl("attention_chunk", attention_chunk_autocast<at::kCUDA>);
}

}  // namespace sparsek::ops
