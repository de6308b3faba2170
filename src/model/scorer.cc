#include "model/scorer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/silu.h>

namespace sparsek::model {
namespace {

ops::PackedLinear pack(const at::Tensor& weight, const at::Tensor& bias, const Placement& placement) {
  if (placement.plain) {
    return ops::plain_linear(weight.to(placement.device), bias.defined() ? bias.to(placement.device) : bias);
  }
  ops::PackedLinear packed = ops::empty_packed(WeightType::kF32, weight.size(0), weight.size(1));
  ops::pack_rows(packed, 0, weight.size(0), static_cast<const uint8_t*>(weight.const_data_ptr()));
  packed.bias = bias;
  return packed;
}

}  // namespace

ScoreScale untrained_scale(int64_t num_kv_heads, double slope, const Placement& placement) {
  const auto filled = [&](double value) { return at::full({num_kv_heads}, value, placement.options(at::kFloat)); };
  return {.beta = filled(0), .gamma = filled(1), .slope = filled(slope)};
}

Scorer::Scorer(const LayerScorer& weights, const Placement& placement) : alpha(weights.alpha) {
  const auto here = [&](const at::Tensor& x) { return x.to(placement.device); };
  scale = {.beta = here(weights.beta), .gamma = here(weights.gamma), .slope = here(weights.slope)};
  if (weights.hidden_weight.defined()) hidden_ = pack(weights.hidden_weight, weights.hidden_bias, placement);
  output_ = pack(weights.weight, {}, placement);
}

at::Tensor Scorer::operator()(const at::Tensor& x) const {
  at::Tensor raw = at::empty({x.size(0), output_.out_features}, x.options().dtype(at::kFloat));
  if (hidden_.defined()) {
    at::Tensor hidden = at::empty({x.size(0), hidden_.out_features}, x.options().dtype(at::kFloat));
    ops::linear_out(x, hidden_, hidden);
    at::silu_(hidden);
    ops::linear_out(hidden, output_, raw);
  } else {
    ops::linear_out(x, output_, raw);
  }
  return raw.unsqueeze(0);
}

}  // namespace sparsek::model
