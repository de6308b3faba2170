// Attention kinds behind one interface: what a layer does with the queries, keys and values of a chunk and with its
// state. One object serves all layers; what differs between layers is in LayerState (and in an adapter's weights and
// budgets).
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "model/adapter.h"
#include "model/attention_config.h"
#include "model/config.h"
#include "model/decode_state.h"
#include "model/placement.h"

namespace sparsek::model {

// Of a chunk of one document [1, tokens, ..], or of a step of several [documents, 1, ..].
struct AttentionInputs {
  at::Tensor x;             // [documents * tokens, dim] what q, k, v were projected from (read by adapters)
  at::Tensor q;             // [documents, tokens, num_heads, head_dim], rotated by position
  at::Tensor k, v;          // [documents, tokens, num_kv_heads, head_dim], k rotated by position
  at::Tensor q_far, k_far;  // eq. 9: R(D) q and k before rotation; undefined without far rotary
};

class Attention {
 public:
  virtual ~Attention() = default;
  virtual LayerState new_state(int64_t layer) const = 0;
  // Single tokens behind so many do the same work on the same tensors as long as this number stays the same: a step
  // that was recorded can then be repeated. Nothing where each does other work.
  virtual std::optional<int> step_phase(int64_t position) const { return std::nullopt; }
  // The chunk behind `position` tokens that `state` has read. Returns [documents, tokens, num_heads, head_dim] and
  // advances the state. The same numbers, up to floating-point order, however a document is cut. Several documents (of
  // kind sparsek only) have read equally much, or their steps have one phase from `position`, the shortest's, on.
  virtual at::Tensor forward(const AttentionInputs& inputs, int64_t layer, int64_t position,
                             LayerState& state) const = 0;
};

// `adapter` is null unless the scorer is one; it is read while building and may go afterwards. expected_tokens: what
// dense attention's cache holds before it has to grow.
std::unique_ptr<Attention> make_attention(const ModelConfig& config, const AttentionConfig& attention,
                                          const Placement& placement, const Adapter* adapter, int64_t expected_tokens);

std::unique_ptr<Attention> make_dense_attention(const ModelConfig& config, const Placement& placement,
                                                int64_t expected_tokens);
std::unique_ptr<Attention> make_window_attention(const ModelConfig& config, const AttentionConfig& attention,
                                                 const Placement& placement);
std::unique_ptr<Attention> make_sparsek_attention(const ModelConfig& config, const AttentionConfig& attention,
                                                  const Placement& placement, const Adapter* adapter);

}  // namespace sparsek::model
