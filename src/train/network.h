// A language model of the Llama family that can be trained: token ids in, final hidden states out, on whole rows,
// packed documents, or chunks behind a carried state. The same numbers as model/transformer.h, with gradients.
//
//   Network network(config, std::move(parameters), settings, options);
//   at::Tensor hidden = network.forward(ids, network.layout(batch, seqlen), nullptr);   // [batch, seqlen, dim]
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "model/config.h"
#include "model/rope.h"
#include "train/attention.h"
#include "train/layout.h"
#include "train/parameters.h"

namespace sparsek::train {

struct NetworkOptions {
  at::ScalarType dtype = at::kFloat;  // of activations and products: kBFloat16, kFloat; kDouble for checks
  at::Device device = at::kCPU;
  bool recompute = false;  // each layer's intermediate results are computed again in the backward pass
  double lora_scale = 1;   // alpha / rank
};

class Network {
 public:
  // Moves the parameters to the device. What needs no gradient can be stored in the compute type already.
  Network(model::ModelConfig config, Parameters parameters, AttentionSettings settings, NetworkOptions options);

  const model::ModelConfig& config() const { return config_; }
  // With the budget of this layer.
  AttentionSettings settings_of_layer(int64_t layer) const;
  const NetworkOptions& options() const { return options_; }
  Parameters& parameters() { return parameters_; }
  const Parameters& parameters() const { return parameters_; }
  // Schedules change topk and window_size between steps.
  void set_sizes(int64_t topk, int64_t window_size);

  Layout layout(int64_t batch, int64_t seqlen, std::vector<int32_t> document_ends = {},
                std::vector<int64_t> positions = {}) const;
  std::vector<LayerState> new_states(int64_t batch) const;

  // ids: int64 [batch, seqlen] on the device. Final normalised hidden states [batch, seqlen, dim] in the compute type.
  // `states`: one a layer, advanced; null: nothing is carried.
  at::Tensor forward(const at::Tensor& ids, const Layout& layout, std::vector<LayerState>* states) const;

  // The attention inputs of each layer in turn, on the way of forward(); for fitting scores to a dense model's
  // attention.
  using Watch = std::function<void(int64_t layer, const AttentionInputs& inputs)>;
  at::Tensor forward_watched(const at::Tensor& ids, const Layout& layout, const Watch& watch) const;

 private:
  // Between layers: the residual stream, and what the last product adds to it. The next norm adds it in passing.
  struct Stream {
    at::Tensor residual;  // float32 (float64): bfloat16 loses small updates of deep models
    at::Tensor update;    // in the compute type; undefined: nothing to add
  };

  at::Tensor embed(const at::Tensor& ids) const;
  at::Tensor norm(const at::Tensor& x, const at::Tensor& weight) const;
  // Of the stream's sum, which then is the stream.
  at::Tensor norm(Stream& stream, const at::Tensor& weight) const;
  at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Lora& lora) const;
  AttentionInputs project(const LayerParameters& layer, const at::Tensor& x, const Layout& layout) const;
  Stream layer_forward(int64_t index, const LayerParameters& layer, Stream stream, const Layout& layout,
                       LayerState* state, const std::function<void(const AttentionInputs&)>& watch) const;

  model::ModelConfig config_;
  Parameters parameters_;
  AttentionSettings settings_;
  NetworkOptions options_;
  model::Rope rope_;
};

}  // namespace sparsek::train
