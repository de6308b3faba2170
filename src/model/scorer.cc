#include "model/scorer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/silu.h>

namespace sparsek::model {
namespace {

ops::PackedLinear pack(const at::Tensor& weight, const at::Tensor& bias) {
  ops::PackedLinear packed = ops::empty_packed(WeightType::kF32, weight.size(0), weight.size(1));
  ops::pack_rows(packed, 0, weight.size(0), static_cast<const uint8_t*>(weight.const_data_ptr()));
  packed.bias = bias;
  return packed;
}

}  // namespace

ScoreScale untrained_scale(int64_t num_kv_heads, double slope) {
  const auto filled = [&](double value) { return at::full({num_kv_heads}, value, at::kFloat); };
  return {.beta = filled(0), .gamma = filled(1), .slope = filled(slope)};
}

Scorer::Scorer(const LayerScorer& weights) : alpha(weights.alpha), scale{weights.beta, weights.gamma, weights.slope} {
  if (weights.hidden_weight.defined()) hidden_ = pack(weights.hidden_weight, weights.hidden_bias);
  output_ = pack(weights.weight, {});
}

at::Tensor Scorer::operator()(const at::Tensor& x) const {
  at::Tensor raw = at::empty({x.size(0), output_.out_features}, at::kFloat);
  if (hidden_.defined()) {
    at::Tensor hidden = at::empty({x.size(0), hidden_.out_features}, at::kFloat);
    ops::linear_out(x, hidden_, hidden);
    at::silu_(hidden);
    ops::linear_out(hidden, output_, raw);
  } else {
    ops::linear_out(x, output_, raw);
  }
  return raw.unsqueeze(0);
}

}  // namespace sparsek::model
