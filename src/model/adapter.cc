#include "model/adapter.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <charconv>
#include <cmath>
#include <map>
#include <optional>

#include "base/error.h"
#include "data/quote.h"
#include "data/safetensors.h"

namespace sparsek::model {
namespace {

constexpr const char* kFormat = "sparsek-adapter-1";
constexpr const char* kFormatOfLayers = "sparsek-adapter-2";  // each layer has a budget of its own
constexpr int64_t kMaxHidden = int64_t{1} << 16;

using Metadata = std::map<std::string, std::string>;

// The numbers an adapter and its model have to agree on.
std::vector<std::pair<std::string, int64_t>> model_sizes(const ModelConfig& model) {
  return {{"num_layers", model.num_layers},     {"dim", model.dim},           {"num_heads", model.num_heads},
          {"num_kv_heads", model.num_kv_heads}, {"head_dim", model.head_dim}, {"vocab_size", model.vocab_size}};
}

class Reader {
 public:
  explicit Reader(const std::string& path) : file_(path) {
    if (text("format") != kFormat && !has_layers()) {
      throw_data("{}: metadata format: expected '{}' or '{}', found {}", path, kFormat, kFormatOfLayers,
                 in_quotes(text("format")));
    }
  }
  bool has(const std::string& key) const { return file_.metadata().contains(key); }
  bool has_layers() const { return text("format") == kFormatOfLayers; }
  const std::string& path() const { return file_.path(); }

  const std::string& text(const std::string& key) const {
    const auto it = file_.metadata().find(key);
    if (it == file_.metadata().end()) {
      throw_data("{}: expected metadata {}, found none; this is no sparsek adapter, or a damaged one", file_.path(),
                 key);
    }
    return it->second;
  }
  int64_t integer(const std::string& key, int64_t low, int64_t high) const {
    const std::string& value = text(key);
    int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < low || number > high) {
      throw_data("{}: metadata {}: expected {} to {}, found {}", file_.path(), key, low, high, in_quotes(value));
    }
    return number;
  }
  bool boolean(const std::string& key) const {
    const std::string& value = text(key);
    if (value != "true" && value != "false") {
      throw_data("{}: metadata {}: expected true or false, found {}", file_.path(), key, in_quotes(value));
    }
    return value == "true";
  }
  bool contains(const std::string& name) const { return file_.find(name) != nullptr; }

  // A float tensor as float32; a dimension of -1 may have any size.
  at::Tensor tensor(const std::string& name, const std::vector<int64_t>& shape) const {
    const WeightView view = file_.weight(name);
    bool matches = view.shape.size() == shape.size();
    for (size_t i = 0; matches && i < shape.size(); ++i) {
      matches = shape[i] < 0 ? view.shape[i] >= 1 && view.shape[i] <= kMaxHidden : view.shape[i] == shape[i];
    }
    if (!matches) {
      throw_data("{}: tensor {}: expected shape {}, found {}", file_.path(), name, shape_text(shape),
                 shape_text(view.shape));
    }
    at::Tensor values = at::empty(view.shape, at::kFloat);
    dequantise(view.type, view.bytes.data(), view.num_elements(), values.mutable_data_ptr<float>());
    const float* data = values.const_data_ptr<float>();
    for (int64_t i = 0; i < view.num_elements(); ++i) {
      if (!std::isfinite(data[i])) throw_data("{}: tensor {} holds NaN or infinity", file_.path(), name);
    }
    return values;
  }

 private:
  SafetensorsFile file_;
};

void check_model(const Reader& file, const ModelConfig& model) {
  if (file.text("architecture") != name(model.architecture)) {
    throw_data("{}: made for another model: expected architecture {}, found {}; use the adapter of this model",
               file.path(), name(model.architecture), in_quotes(file.text("architecture")));
  }
  for (const auto& [key, value] : model_sizes(model)) {
    if (const int64_t found = file.integer(key, 0, INT64_MAX); found != value) {
      throw_data("{}: made for another model ({}): expected {} {}, found {}; use the adapter of this model",
                 file.path(), in_quotes(file.text("base")), key, value, found);
    }
  }
}

std::vector<LayerBudget> read_budgets(const Reader& file, const ModelConfig& model) {
  std::vector<LayerBudget> layers;
  try {
    layers = parse_budgets("layers", file.text("layers"));
  } catch (const UsageError& error) {
    throw_data("{}: metadata {}", file.path(), error.what());
  }
  if (static_cast<int64_t>(layers.size()) != model.num_layers) {
    throw_data("{}: metadata layers: expected budgets of {} layers, found {}", file.path(), model.num_layers,
               layers.size());
  }
  const LayerBudget mean = mean_budget(layers),
                    stated{file.integer("topk", 1, kMaxKeys), file.integer("window_size", 1, kMaxKeys)};
  if (mean != stated) {
    throw_data("{}: metadata topk and window_size: expected the layers' means {} and {}, found {} and {}", file.path(),
               mean.topk, mean.window_size, stated.topk, stated.window_size);
  }
  return layers;
}

LayerScorer read_layer(const Reader& file, const ModelConfig& model, int64_t layer) {
  const std::string prefix = fmt::format("layers.{}.", layer);
  LayerScorer scorer;
  int64_t inputs = model.dim;
  std::string weight = prefix + "scorer.weight";
  if (!file.contains(weight)) {
    scorer.hidden_weight = file.tensor(prefix + "scorer.0.weight", {-1, model.dim});
    inputs = scorer.hidden_weight.size(0);
    scorer.hidden_bias = file.tensor(prefix + "scorer.0.bias", {inputs});
    weight = prefix + "scorer.2.weight";
  }
  scorer.weight = file.tensor(weight, {model.num_kv_heads, inputs});
  scorer.alpha = file.tensor(prefix + "alpha", {1}).const_data_ptr<float>()[0];
  scorer.beta = file.tensor(prefix + "beta", {model.num_kv_heads});
  scorer.gamma = file.tensor(prefix + "gamma", {model.num_kv_heads});
  scorer.slope = file.tensor(prefix + "slope", {model.num_kv_heads});
  for (int64_t h = 0; h < model.num_kv_heads; ++h) {
    const float slope = scorer.slope.const_data_ptr<float>()[h];
    if (slope < 0) throw_data("{}: tensor {}slope: expected values >= 0, found {}", file.path(), prefix, slope);
  }
  return scorer;
}

}  // namespace

Adapter load_adapter(const std::string& path, const ModelConfig& model) {
  const Reader file(path);
  check_model(file, model);
  Adapter adapter;
  adapter.base = file.text("base");
  adapter.timestep_norm = file.boolean("timestep_norm");
  const std::string& gate = file.text("gate");
  if (gate != "soft" && gate != "hard")
    throw_data("{}: metadata gate: expected soft or hard, found {}", path, in_quotes(gate));
  adapter.attention.gate = gate == "soft" ? Gate::kSoft : Gate::kHard;
  adapter.attention.topk = file.integer("topk", 1, kMaxKeys);
  adapter.attention.window_size = file.integer("window_size", 1, kMaxKeys);
  if (file.has_layers()) adapter.attention.layers = read_budgets(file, model);
  if (!file.has_layers() && file.has("layers")) {
    throw_data("{}: metadata layers: expected none in format '{}', found {}", path, kFormat,
               in_quotes(file.text("layers")));
  }
  adapter.attention.num_sinks = file.integer("num_sinks", 0, kMaxKeys);
  adapter.attention.far_distance = file.integer("far_distance", 0, int64_t{1} << 40);
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    adapter.layers.push_back(read_layer(file, model, layer));
    adapter.attention.delayed_scores |= adapter.layers.back().alpha != 0;
  }
  return adapter;
}

void save_adapter(const std::string& path, const Adapter& adapter, const ModelConfig& model) {
  const bool has_layers = !adapter.attention.layers.empty();
  Metadata metadata = {{"format", has_layers ? kFormatOfLayers : kFormat},
                       {"base", adapter.base},
                       {"architecture", name(model.architecture)},
                       {"timestep_norm", adapter.timestep_norm ? "true" : "false"},
                       {"gate", name(adapter.attention.gate.value())},
                       {"topk", std::to_string(adapter.attention.topk.value())},
                       {"window_size", std::to_string(adapter.attention.window_size.value())},
                       {"num_sinks", std::to_string(adapter.attention.num_sinks.value())},
                       {"far_distance", std::to_string(adapter.attention.far_distance.value())}};
  if (has_layers) metadata["layers"] = budgets_text(adapter.attention.layers);
  for (const auto& [key, value] : model_sizes(model)) metadata[key] = std::to_string(value);

  std::vector<at::Tensor> kept;  // what the views point into
  std::vector<WeightView> views;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    kept.push_back(tensor.to(at::kFloat).contiguous());
    const at::Tensor& x = kept.back();
    views.push_back({name,
                     WeightType::kF32,
                     x.sizes().vec(),
                     {static_cast<const uint8_t*>(x.const_data_ptr()), static_cast<size_t>(x.nbytes())}});
  };
  for (size_t i = 0; i < adapter.layers.size(); ++i) {
    const LayerScorer& scorer = adapter.layers[i];
    const std::string prefix = fmt::format("layers.{}.", i);
    const bool is_mlp = scorer.hidden_weight.defined();
    if (is_mlp) {
      add(prefix + "scorer.0.weight", scorer.hidden_weight);
      add(prefix + "scorer.0.bias", scorer.hidden_bias);
    }
    add(prefix + (is_mlp ? "scorer.2.weight" : "scorer.weight"), scorer.weight);
    add(prefix + "alpha", at::full({1}, scorer.alpha, at::kFloat));
    add(prefix + "beta", scorer.beta);
    add(prefix + "gamma", scorer.gamma);
    add(prefix + "slope", scorer.slope);
  }
  write_safetensors(path, views, metadata);
}

}  // namespace sparsek::model
