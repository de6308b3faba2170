#include "train/parameters.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/quant.h"
#include "model/adapter.h"
#include "model/checkpoint.h"
#include "model/weights.h"

namespace sparsek::train {
namespace {

using model::Checkpoint;
using model::WeightId;

class Random {
 public:
  Random(int64_t seed, uint64_t stream)
      : generator_(at::detail::createCPUGenerator(static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15u + stream)) {}
  at::Tensor normal(at::IntArrayRef shape, double std) {
    return at::empty(shape, at::kFloat).normal_(0, std, generator_);
  }

 private:
  at::Generator generator_;
};

// A matrix of a file: float32 [rows, columns], rotary pairs half-split.
at::Tensor load(const Checkpoint& checkpoint, WeightId id, int64_t layer) {
  const std::optional<WeightView> view = checkpoint.find(id, layer);
  if (!view) return {};
  model::check_finite(*view, checkpoint.path());
  at::Tensor values = at::empty(view->shape, at::kFloat);
  dequantise(view->type, view->bytes.data(), view->num_elements(), values.mutable_data_ptr<float>());
  checkpoint.release(*view);
  if (!checkpoint.has_interleaved_rotary(id)) return values;
  const int64_t head_dim = checkpoint.config().head_dim, heads = view->shape[0] / head_dim;
  std::vector<int64_t> pairs = {heads, head_dim / 2, 2};
  pairs.insert(pairs.end(), view->shape.begin() + 1, view->shape.end());
  return values.view(pairs).transpose(1, 2).reshape(view->shape);
}

at::Tensor stacked(const Checkpoint& checkpoint, std::initializer_list<WeightId> ids, int64_t layer) {
  std::vector<at::Tensor> parts;
  for (const WeightId id : ids) {
    at::Tensor part = load(checkpoint, id, layer);
    if (!part.defined()) return {};
    parts.push_back(std::move(part));
  }
  return at::cat(parts, 0);
}

}  // namespace

Parameters random_parameters(const model::ModelConfig& config, const ModelOptions& options, int64_t seed) {
  Random random(seed, 0);
  const double std = options.init_std, output_std = std / std::sqrt(2.0 * static_cast<double>(config.num_layers));
  Parameters parameters;
  parameters.embedding = random.normal({config.vocab_size, config.dim}, std);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    LayerParameters layer;
    layer.attention_norm = at::ones({config.dim});
    layer.qkv = random.normal({config.q_dim() + 2 * config.kv_dim(), config.dim}, std);
    layer.attention_output = random.normal({config.dim, config.q_dim()}, output_std);
    layer.ffn_norm = at::ones({config.dim});
    layer.gate_up = random.normal({2 * config.ffn_dim, config.dim}, std);
    layer.down = random.normal({config.dim, config.ffn_dim}, output_std);
    parameters.layers.push_back(std::move(layer));
  }
  parameters.final_norm = at::ones({config.dim});
  if (!config.tied_embeddings) parameters.output = random.normal({config.vocab_size, config.dim}, std);
  return parameters;
}

Parameters base_parameters(const std::string& path) {
  const Checkpoint checkpoint(path);
  Parameters parameters;
  parameters.embedding = load(checkpoint, WeightId::kEmbedding, 0);
  for (int64_t i = 0; i < checkpoint.config().num_layers; ++i) {
    LayerParameters layer;
    layer.attention_norm = load(checkpoint, WeightId::kAttentionNorm, i);
    layer.qkv = stacked(checkpoint, {WeightId::kQuery, WeightId::kKey, WeightId::kValue}, i);
    layer.qkv_bias = stacked(checkpoint, {WeightId::kQueryBias, WeightId::kKeyBias, WeightId::kValueBias}, i);
    layer.query_norm = load(checkpoint, WeightId::kQueryNorm, i);
    layer.key_norm = load(checkpoint, WeightId::kKeyNorm, i);
    layer.attention_output = load(checkpoint, WeightId::kAttentionOutput, i);
    layer.attention_output_bias = load(checkpoint, WeightId::kAttentionOutputBias, i);
    layer.ffn_norm = load(checkpoint, WeightId::kFfnNorm, i);
    layer.gate_up = stacked(checkpoint, {WeightId::kGate, WeightId::kUp}, i);
    layer.down = load(checkpoint, WeightId::kDown, i);
    parameters.layers.push_back(std::move(layer));
  }
  parameters.final_norm = load(checkpoint, WeightId::kFinalNorm, 0);
  parameters.output = load(checkpoint, WeightId::kOutput, 0);
  return parameters;
}

void clamp_slope(at::Tensor& slope, double largest) {
  slope.clamp_(0, largest < 0 ? std::numeric_limits<double>::infinity() : largest);
}

void add_scorers(Parameters& parameters, const model::ModelConfig& config, const ScorerOptions& options, int64_t seed) {
  if (!options.adapter.empty()) {
    const model::Adapter adapter = model::load_adapter(options.adapter, config);
    if (adapter.timestep_norm != options.timestep_norm) {
      throw_field("scorer.timestep_norm", "expected the adapter's {}, found {}", adapter.timestep_norm,
                  options.timestep_norm);
    }
    for (size_t i = 0; i < parameters.layers.size(); ++i) {
      const model::LayerScorer& from = adapter.layers[i];
      LayerParameters& layer = parameters.layers[i];
      layer.scorer_hidden = from.hidden_weight;
      layer.scorer_hidden_bias = from.hidden_bias;
      layer.scorer = from.weight;
      if (!options.delayed && from.alpha != 0) {
        throw_field("scorer.delayed", "expected true: the adapter's alpha is {}, found false", from.alpha);
      }
      if (options.delayed) layer.alpha = at::full({1}, from.alpha, at::kFloat);
      layer.beta = from.beta;
      layer.gamma = from.gamma;
      layer.slope = from.slope;
      clamp_slope(layer.slope, options.largest_slope);
    }
    return;
  }
  Random random(seed, 1);
  for (LayerParameters& layer : parameters.layers) {
    int64_t inputs = config.dim;
    if (options.hidden > 0) {
      layer.scorer_hidden = random.normal({options.hidden, config.dim}, 1 / std::sqrt(static_cast<double>(config.dim)));
      layer.scorer_hidden_bias = at::zeros({options.hidden});
      inputs = options.hidden;
    }
    // The normalised input has elements near 1, so raw scores come out with a spread near 1 as well.
    layer.scorer = random.normal({config.num_kv_heads, inputs}, 1 / std::sqrt(static_cast<double>(inputs)));
    if (options.delayed) layer.alpha = at::full({1}, options.alpha, at::kFloat);
    layer.beta = at::zeros({config.num_kv_heads});
    layer.gamma = at::ones({config.num_kv_heads});
    layer.slope = at::full({config.num_kv_heads}, options.slope, at::kFloat);
  }
}

void add_lora(Parameters& parameters, int64_t rank, int64_t seed) {
  Random random(seed, 2);
  const auto make = [&](const at::Tensor& matrix) {
    return Lora{random.normal({rank, matrix.size(1)}, 1 / std::sqrt(static_cast<double>(matrix.size(1)))),
                at::zeros({matrix.size(0), rank})};
  };
  for (LayerParameters& layer : parameters.layers) {
    layer.qkv_lora = make(layer.qkv);
    layer.attention_output_lora = make(layer.attention_output);
    layer.gate_up_lora = make(layer.gate_up);
    layer.down_lora = make(layer.down);
  }
}

model::ModelConfig model_config(const ModelOptions& options) {
  model::ModelConfig config;
  config.vocab_size = options.vocab_size;
  config.num_layers = options.num_layers;
  config.dim = options.dim;
  config.ffn_dim = options.ffn_dim;
  config.num_heads = options.num_heads;
  config.num_kv_heads = options.num_kv_heads;
  config.head_dim = options.head_dim;
  config.tied_embeddings = options.tied_embeddings;
  config.rms_eps = options.rms_eps;
  config.rope.theta = options.rope_theta;
  model::check_config(config, "model");
  return config;
}

}  // namespace sparsek::train
