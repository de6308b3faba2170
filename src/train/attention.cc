#include "train/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <limits>

namespace sparsek::train {

std::pair<at::Tensor, LayerState> attend_sparsek(const AttentionSettings& settings, const LayerParameters& layer,
                                                 const AttentionInputs& in, const Layout& layout,
                                                 const LayerState* state);
std::pair<at::Tensor, LayerState> attend_rows(const AttentionSettings& settings, const AttentionInputs& in,
                                              const Layout& layout, const LayerState* state);

namespace {

constexpr std::array kMembers = {
    &LayerState::k,         &LayerState::v,           &LayerState::ring_k,         &LayerState::ring_scores,
    &LayerState::ring_mass, &LayerState::slot_scores, &LayerState::slot_positions, &LayerState::pool_scores,
    &LayerState::stats,     &LayerState::lengths};

// Dense attention over whole documents, by whichever of torch's kernels is fastest here.
at::Tensor dense(const AttentionInputs& in, const Layout& layout) {
  const bool grouped = in.q.size(2) != in.k.size(2);
  const auto document = [&](int64_t first, int64_t count) {
    const auto heads_first = [&](const at::Tensor& x) { return x.narrow(1, first, count).transpose(1, 2); };
    return at::scaled_dot_product_attention(heads_first(in.q), heads_first(in.k), heads_first(in.v), {}, 0.0,
                                            /*is_causal=*/true, {}, grouped)
        .transpose(1, 2);
  };
  if (layout.document_ends.empty()) return document(0, layout.seqlen);
  Tensors parts;
  int64_t first = 0;
  for (const int32_t end : layout.document_ends) {
    parts.push_back(document(first, end - first));
    first = end;
  }
  return at::cat(parts, 1);
}

}  // namespace

LayerState new_layer_state(const AttentionSettings& settings, const model::ModelConfig& config, int64_t batch,
                           at::ScalarType dtype, at::Device device) {
  const model::AttentionConfig& attention = settings.attention;
  if (attention.kind == model::AttentionKind::kSparsek) {
    return ops::new_attention_state({.batch = batch,
                                     .num_kv_heads = config.num_kv_heads,
                                     .head_dim = config.head_dim,
                                     .topk = attention.topk,
                                     .window_size = attention.window_size,
                                     .num_sinks = attention.num_sinks,
                                     .pool_size = settings.pool_size,
                                     .far_rotary = attention.has_far_rotary(),
                                     .delayed_scores = attention.delayed_scores,
                                     .dtype = dtype,
                                     .device = device});
  }
  const auto rows = [&](int64_t count) {
    return at::zeros({batch, count, config.num_kv_heads, config.head_dim}, at::device(device).dtype(dtype));
  };
  const bool is_dense = attention.kind == model::AttentionKind::kDense;
  const int64_t carried = is_dense ? settings.dense_cache : attention.num_sinks + attention.window_size;
  LayerState state;
  state.k = rows(carried);
  state.v = rows(carried);
  if (attention.has_far_rotary()) state.ring_k = rows(attention.window_size);
  state.lengths = at::zeros({batch}, at::device(device).dtype(at::kLong));
  return state;
}

Tensors tensors_of(const LayerState& state) {
  Tensors tensors;
  for (const auto member : kMembers) {
    if ((state.*member).defined()) tensors.push_back(state.*member);
  }
  return tensors;
}

LayerState with_tensors(const LayerState& like, const Tensors& tensors) {
  LayerState state;
  size_t next = 0;
  for (const auto member : kMembers) {
    if ((like.*member).defined()) state.*member = tensors.at(next++);
  }
  return state;
}

LayerState reset_rows(const LayerState& state, const LayerState& fresh, const at::Tensor& starts) {
  LayerState result;
  for (const auto member : kMembers) {
    if (!(state.*member).defined()) continue;
    std::vector<int64_t> shape((state.*member).dim(), 1);
    shape[0] = starts.size(0);
    result.*member = at::where(starts.view(shape), fresh.*member, state.*member);
  }
  return result;
}

LayerState detached(const LayerState& state) {
  LayerState result;
  for (const auto member : kMembers) {
    if ((state.*member).defined()) result.*member = (state.*member).detach();
  }
  return result;
}

std::pair<at::Tensor, LayerState> attend(const AttentionSettings& settings, const LayerParameters& layer,
                                         const AttentionInputs& in, const Layout& layout, const LayerState* state) {
  if (settings.attention.kind == model::AttentionKind::kSparsek) {
    return attend_sparsek(settings, layer, in, layout, state);
  }
  if (settings.attention.kind == model::AttentionKind::kDense && state == nullptr) return {dense(in, layout), {}};
  return attend_rows(settings, in, layout, state);
}

at::Tensor attention_weights(const AttentionInputs& in, int64_t first, int64_t count) {
  const int64_t kv_heads = in.k.size(2), keys = first + count;
  const at::ScalarType wide = in.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const double scale = 1 / std::sqrt(static_cast<double>(in.q.size(3)));
  const at::Tensor q =
      in.q.narrow(1, first, count).unflatten(2, {kv_heads, in.q.size(2) / kv_heads}).permute({0, 2, 3, 1, 4});
  const at::Tensor k = in.k.narrow(1, 0, keys).permute({0, 2, 3, 1}).unsqueeze(2);
  at::Tensor logits = at::matmul(q, k).to(wide).mul_(scale);
  const at::Tensor positions = at::arange(keys, in.q.options().dtype(at::kLong));
  logits.masked_fill_(positions.gt(positions.narrow(0, first, count).unsqueeze(1)),
                      -std::numeric_limits<double>::infinity());
  return at::softmax(logits, -1);
}

}  // namespace sparsek::train
