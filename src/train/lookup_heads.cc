#include "train/lookup_heads.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

namespace sparsek::train {

at::Tensor lookup_scores(const Network& dense, const at::Tensor& text) {
  const at::NoGradGuard no_grad;
  const at::Tensor ids = at::cat({text, text}).unsqueeze(0).to(dense.options().device);
  const int64_t period = text.size(0);
  at::Tensor scores = at::zeros({dense.config().num_layers, dense.config().num_kv_heads}, at::kFloat);
  dense.forward_watched(ids, dense.layout(1, 2 * period), [&](int64_t layer, const AttentionInputs& in) {
    const at::Tensor attention = attention_weights(in, period, period)[0];  // [kv_heads, group, queries, keys]
    scores[layer].copy_(attention.diagonal(0, 2, 3).mean(-1).amax(1));      // key j of query period + j
  });
  return scores;
}

std::vector<HeadIndex> highest_heads(const at::Tensor& scores, int64_t count) {
  const at::Tensor flat = scores.to(at::kCPU, at::kFloat).contiguous();
  const auto* values = flat.const_data_ptr<float>();
  std::vector<int64_t> order(flat.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  std::vector<HeadIndex> heads;
  for (int64_t i = 0; i < std::min<int64_t>(count, flat.numel()); ++i) {
    heads.push_back({order[i] / scores.size(1), order[i] % scores.size(1)});
  }
  return heads;
}

void hold_slopes(Parameters& parameters, const std::vector<HeadIndex>& heads, double value) {
  const at::NoGradGuard no_grad;
  for (size_t layer = 0; layer < parameters.layers.size(); ++layer) {
    at::Tensor& slope = parameters.layers[layer].slope;
    at::Tensor is_learned = at::ones_like(slope);
    for (const HeadIndex& head : heads) {
      if (head.layer != static_cast<int64_t>(layer)) continue;
      slope[head.kv_head].fill_(value);
      is_learned[head.kv_head].zero_();
    }
    if (!slope.requires_grad()) continue;
    slope.register_hook([is_learned](const at::Tensor& gradient) { return gradient * is_learned; });
  }
}

}  // namespace sparsek::train
