// A network small enough for finite differences: 2 layers, dim 16, 4 heads over 2 key-value heads of 8.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include "train/network.h"

namespace sparsek::train::test {

struct TinyOptions {
  model::AttentionKind kind = model::AttentionKind::kSparsek;
  int64_t topk = 5, window_size = 7, num_sinks = 2, far_distance = 0;
  Gate gate = Gate::kSoft;
  std::optional<int64_t> pool_size = {};
  int64_t hidden = 6;
  bool timestep_norm = true, delayed = true, recompute = false, cut_gradient = false;
  at::ScalarType dtype = at::kDouble;
  std::vector<model::LayerBudget> layers = {};
};

inline Network tiny_network(const TinyOptions& options) {
  ModelOptions sizes;
  sizes.vocab_size = 23;
  sizes.num_layers = 2;
  sizes.dim = 16;
  sizes.ffn_dim = 24;
  sizes.num_heads = 4;
  sizes.num_kv_heads = 2;
  sizes.head_dim = 8;
  sizes.init_std = 0.3;
  const model::ModelConfig config = model_config(sizes);
  Parameters parameters = random_parameters(config, sizes, 11);
  AttentionSettings settings;
  settings.attention.kind = options.kind;
  settings.attention.topk = options.kind == model::AttentionKind::kSparsek ? options.topk : 0;
  settings.attention.window_size = options.kind == model::AttentionKind::kDense ? 0 : options.window_size;
  settings.attention.num_sinks = options.kind == model::AttentionKind::kDense ? 0 : options.num_sinks;
  settings.attention.far_distance = options.kind == model::AttentionKind::kDense ? 0 : options.far_distance;
  settings.attention.layers = options.layers;
  settings.attention.gate = options.gate;
  settings.attention.scorer = model::ScorerKind::kAdapter;
  settings.attention.delayed_scores = options.kind == model::AttentionKind::kSparsek && options.delayed;
  settings.pool_size = options.pool_size;
  settings.timestep_norm = options.timestep_norm;
  settings.cut_gradient = options.cut_gradient;
  settings.dense_cache = 64;
  if (options.kind == model::AttentionKind::kSparsek) {
    ScorerOptions scorer;
    scorer.hidden = options.hidden;
    scorer.delayed = options.delayed;
    scorer.alpha = 0.7;
    scorer.slope = 30;
    add_scorers(parameters, config, scorer, 12);
  }
  // Random everywhere, so that a wrong index or a forgotten term shows.
  at::Generator generator = at::detail::createCPUGenerator(13);
  visit_parameters(parameters, [&](const std::string&, at::Tensor& tensor, Group) {
    tensor = tensor.to(options.dtype);
    tensor += at::randn(tensor.sizes(), generator, tensor.options()) * 0.1;
    tensor.requires_grad_(true);
  });
  return Network(config, std::move(parameters), settings, {.dtype = options.dtype, .recompute = options.recompute});
}

inline at::Tensor tiny_ids(int64_t batch, int64_t seqlen, uint64_t seed = 5) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randint(0, 23, {batch, seqlen}, generator, at::kLong);
}

}  // namespace sparsek::train::test
