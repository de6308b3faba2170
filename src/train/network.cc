#include "train/network.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>

namespace sparsek::train {

Network::Network(model::ModelConfig config, Parameters parameters, AttentionSettings settings, NetworkOptions options)
    : config_(std::move(config)),
      parameters_(std::move(parameters)),
      settings_(std::move(settings)),
      options_(options),
      rope_(config_.rope, config_.head_dim, settings_.attention.far_distance) {
  visit_parameters(parameters_, [&](const std::string&, at::Tensor& tensor, Group) {
    tensor = tensor.detach().to(options_.device).requires_grad_(tensor.requires_grad());
  });
}

void Network::set_sizes(int64_t topk, int64_t window_size) {
  settings_.attention.topk = topk;
  settings_.attention.window_size = window_size;
}

Layout Network::layout(int64_t batch, int64_t seqlen, std::vector<int32_t> document_ends,
                       std::vector<int64_t> positions) const {
  return make_layout(rope_, batch, seqlen, std::move(document_ends), std::move(positions), options_.device,
                     options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
}

std::vector<LayerState> Network::new_states(int64_t batch) const {
  std::vector<LayerState> states;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    states.push_back(new_layer_state(settings_, config_, batch, options_.dtype, options_.device));
  }
  return states;
}

// The residual stream stays in float32 (float64): bfloat16 loses small updates of deep models.
at::Tensor Network::embed(const at::Tensor& ids) const {
  return at::embedding(parameters_.embedding, ids).to(options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
}

at::Tensor Network::norm(const at::Tensor& x, const at::Tensor& weight) const {
  const at::Tensor scale = weight.to(x.scalar_type());
  return at::rms_norm(x, {x.size(-1)}, scale, config_.rms_eps).to(options_.dtype);
}

at::Tensor Network::product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const Lora& lora) const {
  const auto cast = [&](const at::Tensor& w) { return w.to(options_.dtype); };
  at::Tensor y = bias.defined() ? at::linear(x, cast(weight), cast(bias)) : at::linear(x, cast(weight));
  if (lora.a.defined()) y = y + at::linear(at::linear(x, cast(lora.a)), cast(lora.b)) * options_.lora_scale;
  return y;
}

AttentionInputs Network::project(const LayerParameters& layer, const at::Tensor& residual, const Layout& layout) const {
  AttentionInputs in;
  in.x = norm(residual, layer.attention_norm);
  const at::Tensor qkv = product(in.x, layer.qkv, layer.qkv_bias, layer.qkv_lora);
  const auto heads = [&](int64_t first, int64_t count) {
    return qkv.narrow(-1, first, count * config_.head_dim).unflatten(-1, {count, config_.head_dim});
  };
  at::Tensor q = heads(0, config_.num_heads), k = heads(config_.q_dim(), config_.num_kv_heads);
  in.v = heads(config_.q_dim() + config_.kv_dim(), config_.num_kv_heads);
  if (layer.query_norm.defined()) {
    q = norm(q.to(residual.scalar_type()), layer.query_norm);
    k = norm(k.to(residual.scalar_type()), layer.key_norm);
  }
  if (layout.far_cos.defined()) {
    in.q_far = rotate(q, layout.far_cos, layout.far_sin);
    in.k_far = k;
  }
  in.q = rotate(q, layout.cos, layout.sin);
  in.k = rotate(k, layout.cos, layout.sin);
  return in;
}

at::Tensor Network::layer_forward(const LayerParameters& layer, at::Tensor residual, const Layout& layout,
                                  LayerState* state, const std::function<void(const AttentionInputs&)>& watch) const {
  const at::ScalarType wide = residual.scalar_type();
  const AttentionInputs in = project(layer, residual, layout);
  if (watch) watch(in);
  auto [out, next] = attend(settings_, layer, in, layout, state);
  if (state != nullptr) *state = std::move(next);
  residual = residual +
             product(out.flatten(-2), layer.attention_output, layer.attention_output_bias, layer.attention_output_lora)
                 .to(wide);
  const at::Tensor x = norm(residual, layer.ffn_norm);
  const at::Tensor gate_up = product(x, layer.gate_up, {}, layer.gate_up_lora);
  const at::Tensor gate = gate_up.narrow(-1, 0, config_.ffn_dim),
                   up = gate_up.narrow(-1, config_.ffn_dim, config_.ffn_dim);
  return residual + product(at::silu(gate) * up, layer.down, {}, layer.down_lora).to(wide);
}

at::Tensor Network::forward(const at::Tensor& ids, const Layout& layout, std::vector<LayerState>* states) const {
  at::Tensor residual = embed(ids);
  for (size_t i = 0; i < parameters_.layers.size(); ++i) {
    const LayerParameters& layer = parameters_.layers[i];
    LayerState* state = states != nullptr ? &(*states)[i] : nullptr;
    if (!options_.recompute || !at::GradMode::is_enabled()) {
      residual = layer_forward(layer, residual, layout, state, {});
      continue;
    }
    // inputs: the residual, the layer's parameters, the carried tensors; outputs: the residual, the carried tensors.
    Tensors inputs = {residual};
    visit_layer(layer, [&](const char*, const at::Tensor& tensor, Group) { inputs.push_back(tensor); });
    if (state != nullptr) {
      for (const at::Tensor& tensor : tensors_of(*state)) inputs.push_back(tensor);
    }
    const LayerState like = state != nullptr ? detached(*state) : LayerState();
    const bool has_state = state != nullptr;
    const auto function = [this, shape = layer, layout, like, has_state](const Tensors& given) -> Tensors {
      LayerParameters local = shape;
      size_t next = 1;
      visit_layer(local, [&](const char*, at::Tensor& tensor, Group) { tensor = given[next++]; });
      if (!has_state) return {layer_forward(local, given[0], layout, nullptr, {})};
      LayerState carried = with_tensors(like, {given.begin() + static_cast<std::ptrdiff_t>(next), given.end()});
      Tensors outputs = {layer_forward(local, given[0], layout, &carried, {})};
      for (const at::Tensor& tensor : tensors_of(carried)) outputs.push_back(tensor);
      return outputs;
    };
    const Tensors outputs = recompute(function, inputs);
    residual = outputs[0];
    if (has_state) *state = with_tensors(like, {outputs.begin() + 1, outputs.end()});
  }
  return norm(residual, parameters_.final_norm);
}

at::Tensor Network::forward_watched(const at::Tensor& ids, const Layout& layout, const Watch& watch) const {
  at::Tensor residual = embed(ids);
  for (size_t i = 0; i < parameters_.layers.size(); ++i) {
    residual = layer_forward(parameters_.layers[i], residual, layout, nullptr,
                             [&](const AttentionInputs& in) { watch(static_cast<int64_t>(i), in); });
  }
  return norm(residual, parameters_.final_norm);
}

}  // namespace sparsek::train
