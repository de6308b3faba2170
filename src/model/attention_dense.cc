// Dense causal attention over a cache that grows with the document: the baseline, and the meaning of the base model.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "model/attention.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {
namespace {

constexpr int64_t kGrowth = 512;  // rows the cache grows by at least

class DenseAttention final : public Attention {
 public:
  DenseAttention(const ModelConfig& config, at::ScalarType dtype)
      : num_kv_heads_(config.num_kv_heads), head_dim_(config.head_dim), dtype_(dtype) {}

  LayerState new_state() const override {
    LayerState state;
    state.k = at::empty({num_kv_heads_, 0, head_dim_}, dtype_);
    state.v = at::empty({num_kv_heads_, 0, head_dim_}, dtype_);
    return state;
  }

  at::Tensor forward(const AttentionInputs& in, int64_t, int64_t position, LayerState& state) const override {
    const int64_t tokens = in.q.size(1), rows = position + tokens;
    append(in.k, position, state.k);
    append(in.v, position, state.v);
    ops::RowAttentionInputs row_inputs;
    row_inputs.q = in.q;
    row_inputs.k = state.k.narrow(1, 0, rows).transpose(0, 1).unsqueeze(0);
    row_inputs.v = state.v.narrow(1, 0, rows).transpose(0, 1).unsqueeze(0);
    row_inputs.window_begin = at::zeros({tokens}, at::kInt);
    row_inputs.num_carried = position;
    row_inputs.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
    return ops::row_attention(row_inputs);
  }

 private:
  // Writes x [1, tokens, num_kv_heads, head_dim] as rows position .. of the cache, growing it by a quarter when full.
  void append(const at::Tensor& x, int64_t position, at::Tensor& cache) const {
    const int64_t rows = position + x.size(1);
    if (rows > cache.size(1)) {
      const int64_t capacity = std::max(rows, cache.size(1) + std::max(kGrowth, cache.size(1) / 4));
      at::Tensor grown = at::empty({num_kv_heads_, capacity, head_dim_}, dtype_);
      grown.narrow(1, 0, position).copy_(cache.narrow(1, 0, position));
      cache = std::move(grown);
    }
    cache.narrow(1, position, x.size(1)).copy_(x.squeeze(0).transpose(0, 1));
  }

  int64_t num_kv_heads_, head_dim_;
  at::ScalarType dtype_;
};

}  // namespace

std::unique_ptr<Attention> make_dense_attention(const ModelConfig& config, at::ScalarType dtype) {
  return std::make_unique<DenseAttention>(config, dtype);
}

}  // namespace sparsek::model
