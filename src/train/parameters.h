// The tensors of a model in training, each with the name it has in checkpoints and the group that says how it is
// optimised. Matrices with the same input lie below each other in one tensor, as inference packs them.
#pragma once
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "train/config.h"

namespace sparsek::train {

// Matrices have weight decay, vectors none. Scorers have a rate of their own, and so have their scales: one number a
// head, of size 1, which is far from what suits a matrix' elements, in either direction.
enum class Group : uint8_t { kMatrix, kVector, kScorer, kScale };
inline constexpr int kNumGroups = 4;
inline bool is_of_scorer(Group group) {
  return group == Group::kScorer || group == Group::kScale;
}

// Adds alpha / rank * b a to the matrix it belongs to.
struct Lora {
  at::Tensor a;  // [rank, in_features]
  at::Tensor b;  // [out_features, rank]
};

// Undefined where the model has none.
struct LayerParameters {
  at::Tensor attention_norm;         // [dim]
  at::Tensor qkv, qkv_bias;          // [q_dim + 2 kv_dim, dim], rows of q, k, v; rotary pairs half-split
  at::Tensor query_norm, key_norm;   // [head_dim]
  at::Tensor attention_output;       // [dim, q_dim]
  at::Tensor attention_output_bias;  // [dim]
  at::Tensor ffn_norm;               // [dim]
  at::Tensor gate_up;                // [2 ffn_dim, dim], rows of gate, up
  at::Tensor down;                   // [dim, ffn_dim]
  Lora qkv_lora, attention_output_lora, gate_up_lora, down_lora;
  // Eq. 1, as in model/adapter.h: sparsek attention alone.
  at::Tensor scorer_hidden, scorer_hidden_bias, scorer, alpha, beta, gamma, slope;
};

struct Parameters {
  at::Tensor embedding;   // [vocab_size, dim]
  at::Tensor output;      // [vocab_size, dim]; undefined when tied
  at::Tensor final_norm;  // [dim]
  std::vector<LayerParameters> layers;

  const at::Tensor& output_matrix() const { return output.defined() ? output : embedding; }
};

// visit(name, tensor, group) for every defined tensor, always in the same order.
template <class Layer, class Visit>
void visit_layer(Layer& layer, Visit visit) {
  const auto one = [&](const char* name, auto& tensor, Group group) {
    if (tensor.defined()) visit(name, tensor, group);
  };
  one("attention_norm", layer.attention_norm, Group::kVector);
  one("qkv", layer.qkv, Group::kMatrix);
  one("qkv.bias", layer.qkv_bias, Group::kVector);
  one("query_norm", layer.query_norm, Group::kVector);
  one("key_norm", layer.key_norm, Group::kVector);
  one("attention_output", layer.attention_output, Group::kMatrix);
  one("attention_output.bias", layer.attention_output_bias, Group::kVector);
  one("ffn_norm", layer.ffn_norm, Group::kVector);
  one("gate_up", layer.gate_up, Group::kMatrix);
  one("down", layer.down, Group::kMatrix);
  one("qkv.lora_a", layer.qkv_lora.a, Group::kMatrix);
  one("qkv.lora_b", layer.qkv_lora.b, Group::kMatrix);
  one("attention_output.lora_a", layer.attention_output_lora.a, Group::kMatrix);
  one("attention_output.lora_b", layer.attention_output_lora.b, Group::kMatrix);
  one("gate_up.lora_a", layer.gate_up_lora.a, Group::kMatrix);
  one("gate_up.lora_b", layer.gate_up_lora.b, Group::kMatrix);
  one("down.lora_a", layer.down_lora.a, Group::kMatrix);
  one("down.lora_b", layer.down_lora.b, Group::kMatrix);
  one("scorer.hidden", layer.scorer_hidden, Group::kScorer);
  one("scorer.hidden.bias", layer.scorer_hidden_bias, Group::kScorer);
  one("scorer", layer.scorer, Group::kScorer);
  one("alpha", layer.alpha, Group::kScale);
  one("beta", layer.beta, Group::kScorer);
  one("gamma", layer.gamma, Group::kScale);
  one("slope", layer.slope, Group::kScale);
}
template <class All, class Visit>
void visit_parameters(All& parameters, Visit visit) {
  visit(std::string("embedding"), parameters.embedding, Group::kMatrix);
  for (size_t i = 0; i < parameters.layers.size(); ++i) {
    visit_layer(parameters.layers[i], [&](const char* name, auto& tensor, Group group) {
      visit(fmt::format("layers.{}.{}", i, name), tensor, group);
    });
  }
  visit(std::string("final_norm"), parameters.final_norm, Group::kVector);
  if (parameters.output.defined()) visit(std::string("output"), parameters.output, Group::kMatrix);
}

// Random weights on the CPU, float32: the same for the same seed everywhere.
Parameters random_parameters(const model::ModelConfig& config, const ModelOptions& options, int64_t seed);
// The weights of a model file, expanded to float32. Throws DataError for tensors that are missing, misshapen or hold
// NaN or infinity.
Parameters base_parameters(const std::string& path);
// Puts a layer's slopes in 0 to `largest`, in place; below 0 that is no limit.
void clamp_slope(at::Tensor& slope, double largest);
// Puts fresh scorers into every layer, or those of options.adapter, their slopes no larger than options.largest_slope.
// Throws DataError when it is another model's.
void add_scorers(Parameters& parameters, const model::ModelConfig& config, const ScorerOptions& options, int64_t seed);
void add_lora(Parameters& parameters, int64_t rank, int64_t seed);

// The configuration of a model made of options.
model::ModelConfig model_config(const ModelOptions& options);

}  // namespace sparsek::train
