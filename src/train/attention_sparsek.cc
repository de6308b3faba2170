// SparseK attention in training: scores (eq. 1, 1b), selection and attention (eq. 3-9), whole or chunk by chunk (eq.
// 13).
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>

#include <algorithm>

#include "ops/state.h"
#include "train/attention.h"

namespace sparsek::train {
namespace {

ops::MaybeTensor maybe(const at::Tensor& x) {
  return x.defined() ? ops::MaybeTensor(x) : std::nullopt;
}

// Eq. 1 behind a state. raw [batch, chunk, num_kv_heads]; the first num_missing[row] rows are no keys: they neither
// enter the statistics nor get a score that anybody reads.
std::pair<at::Tensor, at::Tensor> normalise(const AttentionSettings& settings, const LayerParameters& layer,
                                            const at::Tensor& raw, const at::Tensor& stats,
                                            const std::vector<int64_t>& num_missing) {
  const int64_t chunk = raw.size(1);
  const auto some = [&](const at::Tensor& rows, const at::Tensor& from,
                        int64_t missing) -> std::pair<at::Tensor, at::Tensor> {
    if (missing >= chunk) return {rows, from};
    const auto [u, next] = ops::normalise_scores(rows.narrow(1, missing, chunk - missing), layer.beta, layer.gamma,
                                                 layer.slope, from, {}, settings.timestep_norm);
    if (missing == 0) return {u, next};
    return {at::cat({rows.narrow(1, 0, missing), u}, 1), next};
  };
  if (std::all_of(num_missing.begin(), num_missing.end(), [&](int64_t m) { return m == num_missing[0]; })) {
    return some(raw, stats, num_missing[0]);
  }
  Tensors scores, next;
  for (int64_t row = 0; row < raw.size(0); ++row) {
    const auto [u, after] = some(raw.narrow(0, row, 1), stats.narrow(0, row, 1), num_missing[row]);
    scores.push_back(u);
    next.push_back(after);
  }
  return {at::cat(scores, 0), at::cat(next, 0)};
}

std::pair<at::Tensor, LayerState> chunk_attention(const AttentionSettings& settings, const LayerParameters& layer,
                                                  const AttentionInputs& in, const Layout& layout,
                                                  const LayerState& state) {
  const model::AttentionConfig& attention = settings.attention;
  const int64_t chunk = in.q.size(1), window = attention.window_size;
  ops::AttentionOptions options{.topk = attention.topk,
                                .window_size = window,
                                .num_sinks = attention.num_sinks,
                                .pool_size = settings.pool_size,
                                .gate = model::name(attention.gate),
                                .delayed_scores = attention.delayed_scores};
  at::Tensor raw = raw_scores(layer, in.x);
  at::Tensor ring_mass, ring_scores;
  std::vector<int64_t> num_missing(in.q.size(0), 0);
  if (attention.delayed_scores) {
    at::Tensor y;
    {
      const at::NoGradGuard no_grad;  // y is a constant
      std::tie(y, ring_mass) = ops::window_mass_chunk(in.q, in.k, state, options, maybe(in.q_far), maybe(in.k_far));
    }
    // The scores of keys that leave the window at the chunk's queries: position + t - window.
    const at::Tensor order = ops::ring_order(state.lengths, window);
    const at::Tensor arriving = at::cat({ops::ring_in_order(state.ring_scores, order), raw.transpose(1, 2)}, 2);
    ring_scores = ops::new_ring(arriving, state.lengths, chunk, window);
    raw = arriving.narrow(2, 0, chunk).transpose(1, 2) + layer.alpha * y;
    for (size_t row = 0; row < num_missing.size(); ++row) {
      const int64_t position = layout.positions.empty() ? 0 : layout.positions[row];
      num_missing[row] = std::clamp<int64_t>(window - position, 0, chunk);
    }
  }
  auto [u, stats] = normalise(settings, layer, raw, state.stats, num_missing);
  if (settings.cut_gradient) u = u.detach();
  auto [out, softmax_lse, next] =
      ops::attention_chunk(in.q, in.k, in.v, u, state, options, maybe(in.q_far), maybe(in.k_far));
  next.stats = stats;
  if (ring_mass.defined()) next.ring_mass = ring_mass;
  if (ring_scores.defined()) next.ring_scores = ring_scores;
  return {out, next};
}

}  // namespace

at::Tensor raw_scores(const LayerParameters& layer, const at::Tensor& x) {
  const at::Tensor input = x.to(layer.scorer.scalar_type());
  if (!layer.scorer_hidden.defined()) return at::linear(input, layer.scorer);
  return at::linear(at::silu(at::linear(input, layer.scorer_hidden, layer.scorer_hidden_bias)), layer.scorer);
}

at::Tensor scores(const AttentionSettings& settings, const LayerParameters& layer, const AttentionInputs& in,
                  const Layout& layout) {
  at::Tensor raw = raw_scores(layer, in.x);
  if (settings.attention.delayed_scores) {
    const at::Tensor y = [&] {
      const at::NoGradGuard no_grad;  // y is a constant
      return ops::window_mass(in.q, in.k, settings.attention.window_size, settings.attention.num_sinks, {},
                              maybe(in.q_far), maybe(in.k_far), layout.cu_seqlens);
    }();
    raw = raw + layer.alpha * y;
  }
  return std::get<0>(
      ops::normalise_scores(raw, layer.beta, layer.gamma, layer.slope, {}, layout.cu_seqlens, settings.timestep_norm));
}

std::pair<at::Tensor, LayerState> attend_sparsek(const AttentionSettings& settings, const LayerParameters& layer,
                                                 const AttentionInputs& in, const Layout& layout,
                                                 const LayerState* state) {
  if (state != nullptr) return chunk_attention(settings, layer, in, layout, *state);
  const model::AttentionConfig& attention = settings.attention;
  at::Tensor u = scores(settings, layer, in, layout);
  if (settings.cut_gradient) u = u.detach();
  const auto [out, softmax_lse] = ops::attention(in.q, in.k, in.v, u, attention.topk, attention.window_size,
                                                 attention.num_sinks, settings.pool_size, model::name(attention.gate),
                                                 {}, maybe(in.q_far), maybe(in.k_far), layout.cu_seqlens);
  return {out, {}};
}

}  // namespace sparsek::train
