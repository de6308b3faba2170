// A scorer kept apart from the model it was trained for: a small safetensors file. The model's own weights stay as they
// are.
//
// Per layer N, all float32 (eq. 1):
//   layers.N.scorer.weight    [num_kv_heads, dim]      linear scorer of the layer's normalised input; or, as an MLP,
//   layers.N.scorer.0.weight  [hidden, dim]            then SiLU
//   layers.N.scorer.0.bias    [hidden]
//   layers.N.scorer.2.weight  [num_kv_heads, hidden]
//   layers.N.alpha            [1]                      weight of the delayed score y, not computed where all are 0
//   layers.N.beta, .gamma, .slope  [num_kv_heads]      slope >= 0
// Metadata, all strings: format "sparsek-adapter-1"; base (for people); architecture, num_layers, dim, num_heads,
// num_kv_heads, head_dim, vocab_size (a mismatch is refused); timestep_norm true|false; and the attention it was
// trained with: gate soft|hard, topk, window_size, num_sinks, far_distance (0: off). Format "sparsek-adapter-2", which
// programs that read the first alone refuse, has `layers` beside these: "topk+window" of one layer after the other,
// separated by commas; topk and window_size are their means then.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "model/attention_config.h"
#include "model/config.h"

namespace sparsek::model {

struct LayerScorer {
  at::Tensor hidden_weight, hidden_bias;  // undefined for a linear scorer
  at::Tensor weight;                      // [num_kv_heads, dim or hidden]
  double alpha = 0;
  at::Tensor beta, gamma, slope;  // [num_kv_heads]
};

struct Adapter {
  std::string base;
  bool timestep_norm = true;
  AttentionDefaults attention;
  std::vector<LayerScorer> layers;
};

// Throws DataError naming file and key or tensor: no adapter, of another model, missing or misshapen tensors, values
// that are not finite, numbers out of range.
Adapter load_adapter(const std::string& path, const ModelConfig& model);

void save_adapter(const std::string& path, const Adapter& adapter, const ModelConfig& model);

}  // namespace sparsek::model
