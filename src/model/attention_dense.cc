// Dense causal attention over a cache that grows with the document: the baseline, and the meaning of the base model.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "base/saturate.h"
#include "model/attention.h"
#include "model/memory_check.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {
namespace {

constexpr int64_t kGrowth = 512;  // rows the cache grows by at least

class DenseAttention final : public Attention {
 public:
  DenseAttention(const ModelConfig& config, const Placement& placement, int64_t expected_tokens)
      : num_layers_(config.num_layers),
        num_kv_heads_(config.num_kv_heads),
        head_dim_(config.head_dim),
        expected_tokens_(expected_tokens),
        placement_(placement) {}

  LayerState new_state(int64_t /*layer*/) const override {
    LayerState state;
    state.k = at::empty({num_kv_heads_, 0, head_dim_}, placement_.options());
    state.v = at::empty({num_kv_heads_, 0, head_dim_}, placement_.options());
    return state;
  }

  at::Tensor forward(const AttentionInputs& in, int64_t layer, int64_t position, LayerState& state) const override {
    const int64_t tokens = in.q.size(1), rows = position + tokens;
    if (layer == 0 && rows > state.k.size(1)) check_room(rows, state.k.size(1));
    append(in.k, position, state.k);
    append(in.v, position, state.v);
    ops::RowAttentionInputs row_inputs;
    row_inputs.q = in.q;
    row_inputs.k = state.k.narrow(1, 0, rows).transpose(0, 1).unsqueeze(0);
    row_inputs.v = state.v.narrow(1, 0, rows).transpose(0, 1).unsqueeze(0);
    row_inputs.num_carried = position;
    row_inputs.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
    return ops::row_attention(row_inputs);
  }

 private:
  // Rows of a cache that has to hold `rows`: what is expected, then a quarter more each time.
  int64_t capacity(int64_t rows, int64_t held) const {
    return std::max({rows, expected_tokens_, held + std::max(kGrowth, held / 4)});
  }

  // All layers are about to grow: better to stop before the first than to run out of memory at the tenth.
  void check_room(int64_t rows, int64_t held) const {
    const int64_t more = saturating_multiply(capacity(rows, held) - held, 2 * num_layers_);
    const int64_t copied = held;  // while it is copied, one cache exists twice
    const int64_t row_bytes = num_kv_heads_ * head_dim_ * static_cast<int64_t>(c10::elementSize(placement_.dtype));
    check_growth(capacity(rows, held), saturating_multiply(saturating_add(more, copied), row_bytes),
                 available_memory_bytes(placement_.device));
  }

  // Writes x [1, tokens, num_kv_heads, head_dim] as rows position .. of the cache, growing it when full.
  void append(const at::Tensor& x, int64_t position, at::Tensor& cache) const {
    const int64_t rows = position + x.size(1);
    if (rows > cache.size(1)) {
      at::Tensor grown = at::empty({num_kv_heads_, capacity(rows, cache.size(1)), head_dim_}, placement_.options());
      grown.narrow(1, 0, position).copy_(cache.narrow(1, 0, position));
      cache = std::move(grown);
    }
    cache.narrow(1, position, x.size(1)).copy_(x.squeeze(0).transpose(0, 1));
  }

  int64_t num_layers_, num_kv_heads_, head_dim_, expected_tokens_;
  Placement placement_;
};

}  // namespace

std::unique_ptr<Attention> make_dense_attention(const ModelConfig& config, const Placement& placement,
                                                int64_t expected_tokens) {
  return std::make_unique<DenseAttention>(config, placement, expected_tokens);
}

}  // namespace sparsek::model
