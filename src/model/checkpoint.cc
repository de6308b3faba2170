#include "model/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <unordered_set>

#include "base/error.h"
#include "data/json_file.h"
#include "data/quote.h"

namespace sparsek::model {
namespace {

struct WeightNames {
  WeightId id;
  bool per_layer;
  const char* gguf;         // behind "blk.N." when per layer
  const char* huggingface;  // behind "model.layers.N." when per layer
};
constexpr WeightNames kNames[] = {
    {WeightId::kEmbedding, false, "token_embd.weight", "model.embed_tokens.weight"},
    {WeightId::kOutput, false, "output.weight", "lm_head.weight"},
    {WeightId::kFinalNorm, false, "output_norm.weight", "model.norm.weight"},
    {WeightId::kAttentionNorm, true, "attn_norm.weight", "input_layernorm.weight"},
    {WeightId::kQuery, true, "attn_q.weight", "self_attn.q_proj.weight"},
    {WeightId::kKey, true, "attn_k.weight", "self_attn.k_proj.weight"},
    {WeightId::kValue, true, "attn_v.weight", "self_attn.v_proj.weight"},
    {WeightId::kAttentionOutput, true, "attn_output.weight", "self_attn.o_proj.weight"},
    {WeightId::kQueryBias, true, "attn_q.bias", "self_attn.q_proj.bias"},
    {WeightId::kKeyBias, true, "attn_k.bias", "self_attn.k_proj.bias"},
    {WeightId::kValueBias, true, "attn_v.bias", "self_attn.v_proj.bias"},
    {WeightId::kAttentionOutputBias, true, "attn_output.bias", "self_attn.o_proj.bias"},
    {WeightId::kQueryNorm, true, "attn_q_norm.weight", "self_attn.q_norm.weight"},
    {WeightId::kKeyNorm, true, "attn_k_norm.weight", "self_attn.k_norm.weight"},
    {WeightId::kFfnNorm, true, "ffn_norm.weight", "post_attention_layernorm.weight"},
    {WeightId::kGate, true, "ffn_gate.weight", "mlp.gate_proj.weight"},
    {WeightId::kUp, true, "ffn_up.weight", "mlp.up_proj.weight"},
    {WeightId::kDown, true, "ffn_down.weight", "mlp.down_proj.weight"},
};

const WeightNames& names_of(WeightId id) {
  return kNames[static_cast<int>(id)];
}

std::string file_name(const WeightNames& names, bool is_gguf, int64_t layer) {
  const char* name = is_gguf ? names.gguf : names.huggingface;
  if (!names.per_layer) return name;
  return fmt::format(fmt::runtime(is_gguf ? "blk.{}.{}" : "model.layers.{}.{}"), layer, name);
}

std::vector<int64_t> wanted_shape(WeightId id, const ModelConfig& config) {
  switch (id) {
    case WeightId::kEmbedding:
    case WeightId::kOutput:
      return {config.vocab_size, config.dim};
    case WeightId::kFinalNorm:
    case WeightId::kAttentionNorm:
    case WeightId::kFfnNorm:
    case WeightId::kAttentionOutputBias:
      return {config.dim};
    case WeightId::kQuery:
      return {config.q_dim(), config.dim};
    case WeightId::kKey:
    case WeightId::kValue:
      return {config.kv_dim(), config.dim};
    case WeightId::kAttentionOutput:
      return {config.dim, config.q_dim()};
    case WeightId::kQueryBias:
      return {config.q_dim()};
    case WeightId::kKeyBias:
    case WeightId::kValueBias:
      return {config.kv_dim()};
    case WeightId::kQueryNorm:
    case WeightId::kKeyNorm:
      return {config.head_dim};
    case WeightId::kGate:
    case WeightId::kUp:
      return {config.ffn_dim, config.dim};
    case WeightId::kDown:
      return {config.dim, config.ffn_dim};
  }
  return {};
}

bool is_wanted(WeightId id, const ModelConfig& config) {
  switch (id) {
    case WeightId::kOutput:
      return !config.tied_embeddings;
    case WeightId::kQueryBias:
    case WeightId::kKeyBias:
    case WeightId::kValueBias:
      return config.qkv_bias;
    case WeightId::kAttentionOutputBias:
      return config.output_bias;
    case WeightId::kQueryNorm:
    case WeightId::kKeyNorm:
      return config.qk_norm;
    default:
      return true;
  }
}

bool is_norm(WeightId id) {
  return id == WeightId::kFinalNorm || id == WeightId::kAttentionNorm || id == WeightId::kFfnNorm ||
         id == WeightId::kQueryNorm || id == WeightId::kKeyNorm;
}

// A prime number of random values over and over, so that rows differ: making every one would take seconds a billion.
std::vector<BFloat16> random_values(int64_t count) {
  constexpr int64_t kPeriod = 1'048'573;
  const float range = 0.02f * std::sqrt(3.0f);
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-range, range);
  std::vector<BFloat16> values(count);
  for (int64_t i = 0; i < std::min(count, kPeriod); ++i) values[i] = to_bf16(uniform(generator));
  for (int64_t i = kPeriod; i < count; i += kPeriod) {
    std::copy_n(values.begin(), std::min(kPeriod, count - i), values.begin() + i);
  }
  return values;
}

}  // namespace

Checkpoint Checkpoint::random(const std::string& config_path) {
  Checkpoint checkpoint;
  checkpoint.path_ = config_path;
  checkpoint.config_ = config_from_huggingface(read_json_object(config_path), config_path);
  const ModelConfig& config = checkpoint.config_;
  const int64_t widest = std::max({config.vocab_size, config.q_dim(), config.ffn_dim});
  checkpoint.random_ = random_values(widest * config.dim);
  checkpoint.ones_.assign(std::max(config.dim, config.head_dim), to_bf16(1));
  return checkpoint;
}

Checkpoint::Checkpoint(const std::string& path) : path_(path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    huggingface_.emplace(path);
    config_ = config_from_huggingface(huggingface_->config(), huggingface_->file("config.json"));
  } else {
    gguf_.emplace(path);
    config_ = config_from_gguf(*gguf_, path);
  }
  refuse_unknown_tensors();
}

std::optional<WeightView> Checkpoint::find(WeightId id, int64_t layer) const {
  if (!is_wanted(id, config_)) return std::nullopt;
  const std::string name = file_name(names_of(id), gguf_.has_value(), layer);
  const std::vector<int64_t> wanted = wanted_shape(id, config_);
  if (!random_.empty()) {
    WeightView view{name, WeightType::kBF16, wanted, {}};
    const std::vector<BFloat16>& values = is_norm(id) ? ones_ : random_;
    view.bytes = {reinterpret_cast<const uint8_t*>(values.data()), view.num_elements() * sizeof(BFloat16)};
    return view;
  }
  WeightView view = gguf_ ? gguf_->tensor(name) : huggingface_->weight(name);
  if (view.shape != wanted) {
    throw_data("{}: tensor {}: expected shape {}, found {}", path_, name, shape_text(wanted), shape_text(view.shape));
  }
  return view;
}

WeightView Checkpoint::weight(WeightId id, int64_t layer) const {
  if (auto view = find(id, layer)) return *view;
  throw_data("{}: expected tensor {}, found none", path_, file_name(names_of(id), gguf_.has_value(), layer));
}

void Checkpoint::release(const WeightView& weight) const {
  if (gguf_) {
    gguf_->release_pages(weight);
  } else if (huggingface_) {
    huggingface_->release_pages(weight);
  }
}

bool Checkpoint::has_interleaved_rotary(WeightId id) const {
  if (!gguf_ || config_.architecture != Architecture::kLlama) return false;
  return id == WeightId::kQuery || id == WeightId::kKey || id == WeightId::kQueryBias || id == WeightId::kKeyBias;
}

std::vector<WeightView> Checkpoint::tensors() const {
  if (gguf_) return gguf_->tensors();
  std::vector<WeightView> views;
  if (!huggingface_) return views;
  for (const std::string& name : huggingface_->tensor_names()) views.push_back(huggingface_->weight(name));
  return views;
}

void Checkpoint::refuse_unknown_tensors() const {
  // Written by converters, not part of what is computed: frequencies (read by the config, or recomputed), and an output
  // matrix that repeats a tied embedding.
  std::unordered_set<std::string> known = {"rope_freqs.weight", "lm_head.weight"};
  for (const WeightNames& names : kNames) {
    if (!is_wanted(names.id, config_)) continue;
    for (int64_t layer = 0; layer < (names.per_layer ? config_.num_layers : 1); ++layer) {
      known.insert(file_name(names, gguf_.has_value(), layer));
    }
  }
  const auto check = [&](const std::string& name) {
    if (!known.contains(name) && !name.ends_with(".rotary_emb.inv_freq")) {
      throw_data(
          "{}: expected the tensors of the {} architecture, found the unknown tensor {}; this variant is not supported",
          path_, model::name(config_.architecture), in_quotes(name));
    }
  };
  if (gguf_) {
    for (const WeightView& view : gguf_->tensors()) check(view.name);
  } else {
    for (const std::string& name : huggingface_->tensor_names()) check(name);
  }
}

ModelConfig read_model_config(const std::string& path) {
  return Checkpoint(path).config();
}

}  // namespace sparsek::model
