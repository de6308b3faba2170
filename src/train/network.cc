#include "train/network.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>

#include "ops/layer_ops.h"

namespace sparsek::train {

Network::Network(model::ModelConfig config, Parameters parameters, AttentionSettings settings, NetworkOptions options)
    : config_(std::move(config)),
      parameters_(std::move(parameters)),
      settings_(std::move(settings)),
      options_(options),
      // On a GPU angles are computed there: on the host they would take as long as a layer does.
      rope_(config_.rope, config_.head_dim, settings_.attention.far_distance,
            {.device = options_.device, .plain = !options_.device.is_cpu()}) {
  visit_parameters(parameters_, [&](const std::string&, at::Tensor& tensor, Group) {
    tensor = tensor.detach().to(options_.device).requires_grad_(tensor.requires_grad());
  });
}

void Network::set_sizes(int64_t topk, int64_t window_size) {
  settings_.attention.topk = topk;
  settings_.attention.window_size = window_size;
}

AttentionSettings Network::settings_of_layer(int64_t layer) const {
  AttentionSettings settings = settings_;
  settings.attention = settings_.attention.of_layer(layer);
  return settings;
}

Layout Network::layout(int64_t batch, int64_t seqlen, std::vector<int32_t> document_ends,
                       std::vector<int64_t> positions) const {
  return make_layout(rope_, batch, seqlen, std::move(document_ends), std::move(positions), options_.device,
                     options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
}

std::vector<LayerState> Network::new_states(int64_t batch) const {
  std::vector<LayerState> states;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    states.push_back(new_layer_state(settings_of_layer(i), config_, batch, options_.dtype, options_.device));
  }
  return states;
}

at::Tensor Network::embed(const at::Tensor& ids) const {
  return at::embedding(parameters_.embedding, ids).to(options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
}

at::Tensor Network::norm(const at::Tensor& x, const at::Tensor& weight) const {
  return ops::add_rms_norm(x, {}, weight, config_.rms_eps, options_.dtype).out;
}

at::Tensor Network::norm(Stream& stream, const at::Tensor& weight) const {
  const ops::MaybeTensor update = stream.update.defined() ? ops::MaybeTensor(stream.update) : std::nullopt;
  const auto [sum, out] = ops::add_rms_norm(stream.residual, update, weight, config_.rms_eps, options_.dtype);
  stream = {sum, {}};
  return out;
}

at::Tensor Network::product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            const Lora& lora) const {
  const auto cast = [&](const at::Tensor& w) { return w.to(options_.dtype); };
  at::Tensor y = bias.defined() ? at::linear(x, cast(weight), cast(bias)) : at::linear(x, cast(weight));
  if (lora.a.defined()) y = y + at::linear(at::linear(x, cast(lora.a)), cast(lora.b)) * options_.lora_scale;
  return y;
}

AttentionInputs Network::project(const LayerParameters& layer, const at::Tensor& x, const Layout& layout) const {
  at::Tensor qkv = product(x, layer.qkv, layer.qkv_bias, layer.qkv_lora);
  if (layer.query_norm.defined()) {
    const at::ScalarType wide = layout.cos.scalar_type();
    const auto normed = [&](int64_t first, int64_t count, const at::Tensor& weight) {
      const at::Tensor heads = qkv.narrow(-1, first, count * config_.head_dim).unflatten(-1, {count, config_.head_dim});
      return norm(heads.to(wide), weight).flatten(-2);
    };
    qkv = at::cat(
        {normed(0, config_.num_heads, layer.query_norm), normed(config_.q_dim(), config_.num_kv_heads, layer.key_norm),
         qkv.narrow(-1, config_.q_dim() + config_.kv_dim(), config_.kv_dim())},
        -1);
  }
  const auto maybe = [](const at::Tensor& tensor) {
    return tensor.defined() ? ops::MaybeTensor(tensor) : std::nullopt;
  };
  const auto [q, k, v, q_far, k_far] =
      ops::split_rotary(qkv, layout.cos, layout.sin, maybe(layout.far_cos), maybe(layout.far_sin), config_.num_heads,
                        config_.num_kv_heads);
  return {.x = x, .q = q, .k = k, .v = v, .q_far = q_far, .k_far = k_far};
}

Network::Stream Network::layer_forward(int64_t index, const LayerParameters& layer, Stream stream, const Layout& layout,
                                       LayerState* state,
                                       const std::function<void(const AttentionInputs&)>& watch) const {
  const AttentionInputs in = project(layer, norm(stream, layer.attention_norm), layout);
  if (watch) watch(in);
  auto [out, next] = attend(settings_of_layer(index), layer, in, layout, state);
  if (state != nullptr) *state = std::move(next);
  stream.update =
      product(out.flatten(-2), layer.attention_output, layer.attention_output_bias, layer.attention_output_lora);
  const at::Tensor gate_up = product(norm(stream, layer.ffn_norm), layer.gate_up, {}, layer.gate_up_lora);
  stream.update = product(ops::swiglu(gate_up), layer.down, {}, layer.down_lora);
  return stream;
}

at::Tensor Network::forward(const at::Tensor& ids, const Layout& layout, std::vector<LayerState>* states) const {
  Stream stream{embed(ids), {}};
  for (size_t i = 0; i < parameters_.layers.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    const LayerParameters& layer = parameters_.layers[i];
    LayerState* state = states != nullptr ? &(*states)[i] : nullptr;
    if (!options_.recompute || !at::GradMode::is_enabled()) {
      stream = layer_forward(index, layer, std::move(stream), layout, state, {});
      continue;
    }
    // inputs: the stream, the layer's parameters, the carried tensors; outputs: the stream, the carried tensors.
    Tensors inputs = {stream.residual};
    const bool has_update = stream.update.defined();
    if (has_update) inputs.push_back(stream.update);
    visit_layer(layer, [&](const char*, const at::Tensor& tensor, Group) { inputs.push_back(tensor); });
    if (state != nullptr) {
      for (const at::Tensor& tensor : tensors_of(*state)) inputs.push_back(tensor);
    }
    const LayerState like = state != nullptr ? detached(*state) : LayerState();
    const bool has_state = state != nullptr;
    const auto function = [this, index, shape = layer, layout, like, has_state,
                           has_update](const Tensors& given) -> Tensors {
      LayerParameters local = shape;
      size_t next = 0;
      Stream from{given[next++], {}};
      if (has_update) from.update = given[next++];
      visit_layer(local, [&](const char*, at::Tensor& tensor, Group) { tensor = given[next++]; });
      LayerState carried;
      if (has_state) carried = with_tensors(like, {given.begin() + static_cast<std::ptrdiff_t>(next), given.end()});
      const Stream to = layer_forward(index, local, std::move(from), layout, has_state ? &carried : nullptr, {});
      Tensors outputs = {to.residual, to.update};
      if (has_state) {
        for (const at::Tensor& tensor : tensors_of(carried)) outputs.push_back(tensor);
      }
      return outputs;
    };
    const Tensors outputs = recompute(function, inputs);
    stream = {outputs[0], outputs[1]};
    if (has_state) *state = with_tensors(like, {outputs.begin() + 2, outputs.end()});
  }
  return norm(stream, parameters_.final_norm);
}

at::Tensor Network::forward_watched(const at::Tensor& ids, const Layout& layout, const Watch& watch) const {
  Stream stream{embed(ids), {}};
  for (size_t i = 0; i < parameters_.layers.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    stream = layer_forward(index, parameters_.layers[i], std::move(stream), layout, nullptr,
                           [&](const AttentionInputs& in) { watch(index, in); });
  }
  return norm(stream, parameters_.final_norm);
}

}  // namespace sparsek::train
