// The attention kinds in training: whole rows, packed documents, or chunks behind a carried state (eq. 13). All of them
// are made of the differentiable operations of src/ops; devices and gradients are theirs.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "model/attention_config.h"
#include "model/config.h"
#include "ops/ops.h"
#include "train/layout.h"
#include "train/parameters.h"
#include "train/recompute.h"

namespace sparsek::train {

struct AttentionSettings {
  model::AttentionConfig attention;  // topk and window_size as the schedule has them now
  std::optional<int64_t> pool_size;
  bool timestep_norm = true, cut_gradient = false;
  int64_t dense_cache = 1024;  // tokens that dense attention carries from chunk to chunk
};

struct AttentionInputs {
  at::Tensor x;             // [batch, seqlen, dim] what q, k, v were projected from
  at::Tensor q;             // [batch, seqlen, num_heads, head_dim], rotated by position
  at::Tensor k, v;          // [batch, seqlen, num_kv_heads, head_dim], k rotated by position
  at::Tensor q_far, k_far;  // eq. 9: R(D) q and k before rotation; undefined without far rotary
};

// What a layer carries from chunk to chunk. Kind sparsek: ops/ops.h. Kinds window and dense use the members lengths, k
// and v, rows in position order: [batch, num_sinks + window_size, num_kv_heads, head_dim], un-rotated with far rotary
// (ring_k then has the window's rotated keys), and [batch, dense_cache, num_kv_heads, head_dim].
using LayerState = ops::AttentionState;

LayerState new_layer_state(const AttentionSettings& settings, const model::ModelConfig& config, int64_t batch,
                           at::ScalarType dtype, at::Device device);
// Its defined tensors and back, in one order.
Tensors tensors_of(const LayerState& state);
LayerState with_tensors(const LayerState& like, const Tensors& tensors);
// Rows where `starts` (bool [batch]) come from `fresh`.
LayerState reset_rows(const LayerState& state, const LayerState& fresh, const at::Tensor& starts);
LayerState detached(const LayerState& state);

// [batch, seqlen, num_heads, head_dim], and the state behind the chunk; `state` null: whole rows, nothing carried.
std::pair<at::Tensor, LayerState> attend(const AttentionSettings& settings, const LayerParameters& layer,
                                         const AttentionInputs& in, const Layout& layout, const LayerState* state);

// What dense causal attention pays: of the queries first .. first + count - 1, [batch, num_kv_heads, heads of a group,
// count, first + count], float32 (float64 for float64 inputs), for those who look at it; attend() never makes it.
at::Tensor attention_weights(const AttentionInputs& in, int64_t first, int64_t count);

// Raw scores r of eq. 1 without the delayed part, float32 (float64 for float64 inputs) [batch, seqlen, num_kv_heads].
at::Tensor raw_scores(const LayerParameters& layer, const at::Tensor& x);
// Eq. 1 of whole rows, delayed part included.
at::Tensor scores(const AttentionSettings& settings, const LayerParameters& layer, const AttentionInputs& in,
                  const Layout& layout);

}  // namespace sparsek::train
