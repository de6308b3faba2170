#include "train/lookup_heads.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sparsek::train {

at::Tensor lookup_scores(const Network& dense, const at::Tensor& text) {
  const at::NoGradGuard no_grad;
  const at::Tensor ids = at::cat({text, text}).unsqueeze(0).to(dense.options().device);
  const int64_t period = text.size(0), seqlen = 2 * period, kv_heads = dense.config().num_kv_heads;
  at::Tensor scores = at::zeros({dense.config().num_layers, kv_heads}, at::kFloat);
  const at::Tensor positions = at::arange(seqlen, ids.options());
  // Of the second time: all tokens but the last, whose successor of the first time is no key of its own.
  const at::Tensor queries = positions.slice(0, period, seqlen - 1);
  const at::Tensor is_later = positions.unsqueeze(0).gt(queries.unsqueeze(1));
  dense.forward_watched(ids, dense.layout(1, seqlen), [&](int64_t layer, const AttentionInputs& in) {
    const int64_t group = in.q.size(2) / kv_heads;
    const double scale = 1 / std::sqrt(static_cast<double>(in.q.size(3)));
    // [kv_heads, group, queries, head_dim] and [kv_heads, 1, head_dim, seqlen].
    const at::Tensor q = in.q[0].index_select(0, queries).unflatten(1, {kv_heads, group}).permute({1, 2, 0, 3});
    const at::Tensor k = in.k[0].permute({1, 2, 0}).unsqueeze(1);
    at::Tensor logits = at::matmul(q, k).to(at::kFloat).mul_(scale);
    logits.masked_fill_(is_later, -std::numeric_limits<double>::infinity());
    const at::Tensor attention = at::softmax(logits, -1);
    const auto paid = [&](const at::Tensor& keys) {  // [kv_heads]
      const at::Tensor index = keys.view({1, 1, -1, 1}).expand({kv_heads, group, -1, 1});
      return attention.gather(3, index).squeeze(3).mean(-1).amax(1);
    };
    scores[layer].copy_(at::maximum(paid(queries - period), paid(queries - period + 1)));
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
