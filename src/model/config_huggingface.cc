// ModelConfig from a Hugging Face config.json, in the format of transformers 5 (rope_parameters) and of earlier
// versions (rope_theta, rope_scaling).
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.h"
#include "data/quote.h"
#include "model/config.h"

namespace sparsek::model {
namespace {

using Json = nlohmann::json;

// One JSON object with typed look-ups that name the file and the key.
class Fields {
 public:
  Fields(const Json& object, std::string source, std::string prefix = "")
      : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {
    if (!object.is_object()) throw_data("{}: {} is not a JSON object", source_, prefix_.empty() ? "the file" : prefix_);
  }
  const Json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  int64_t integer(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr) missing(key);
    return to_integer(key, *value);
  }
  int64_t integer_or(const char* key, int64_t otherwise) const {
    const Json* value = find(key);
    return value == nullptr ? otherwise : to_integer(key, *value);
  }
  double number(const char* key) const {
    if (find(key) == nullptr) missing(key);
    return number_or(key, 0);
  }
  double number_or(const char* key, double otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_number()) wrong(key, "a number", *value);
    return value->get<double>();
  }
  bool boolean_or(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) wrong(key, "true or false", *value);
    return value->get<bool>();
  }
  std::string text_or(const char* key, const char* otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) wrong(key, "a string", *value);
    return value->get<std::string>();
  }
  template <class... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) const {
    throw_data("{}: {}", source_, fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  [[noreturn]] void missing(const char* key) const { refuse("expected the key {}{}, found none", prefix_, key); }
  [[noreturn]] void wrong(const char* key, const char* wanted, const Json& found) const {
    const std::string text = found.dump(-1, ' ', true, Json::error_handler_t::replace);
    refuse("{}{}: expected {}, found {}", prefix_, key, wanted, in_quotes(text));
  }
  int64_t to_integer(const char* key, const Json& value) const {
    const bool fits =
        value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t{INT64_MAX} : value.is_number_integer();
    if (!fits) wrong(key, "an integer", value);
    return value.get<int64_t>();
  }

  const Json& object_;
  std::string source_, prefix_;
};

Architecture read_architecture(const Fields& fields) {
  std::string found;
  if (const Json* list = fields.find("architectures")) {
    if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
      fields.refuse("architectures: expected a list of one name");
    }
    found = list->front().get<std::string>();
  } else {
    fields.refuse("expected the key architectures, found none");
  }
  if (found == "LlamaForCausalLM") return Architecture::kLlama;
  if (found == "Qwen2ForCausalLM") return Architecture::kQwen2;
  if (found == "Qwen3ForCausalLM") return Architecture::kQwen3;
  fields.refuse(
      "expected architecture LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM, found {}; this model is not "
      "supported",
      in_quotes(found));
}

void refuse_sliding_window(const Fields& fields) {
  // Qwen configs carry a sliding_window number that counts only with use_sliding_window.
  const bool used = fields.boolean_or("use_sliding_window", fields.find("sliding_window") != nullptr);
  if (used && fields.find("sliding_window") != nullptr) {
    fields.refuse("sliding window attention (sliding_window {}) is not supported", fields.integer("sliding_window"));
  }
  if (const Json* types = fields.find("layer_types")) {
    if (!types->is_array()) fields.refuse("layer_types: expected a list");
    for (const Json& type : *types) {
      if (type != "full_attention")
        fields.refuse("layer_types: expected \"full_attention\" only, found {}",
                      in_quotes(type.dump(-1, ' ', true, Json::error_handler_t::replace)));
    }
  }
}

RopeConfig read_rope(const Json& config, const Fields& fields, const std::string& source) {
  RopeConfig rope;
  rope.theta = fields.number_or("rope_theta", rope.theta);
  const char* key = fields.find("rope_parameters") != nullptr ? "rope_parameters" : "rope_scaling";
  if (fields.find(key) == nullptr) return rope;
  const Fields scaling(config.at(key), source, std::string(key) + ".");
  rope.theta = scaling.number_or("rope_theta", rope.theta);
  const std::string type = scaling.text_or("rope_type", scaling.text_or("type", "default").c_str());
  if (scaling.number_or("partial_rotary_factor", 1.0) != 1.0)
    scaling.refuse("partial rotary embedding is not supported");
  if (type == "default") return rope;
  if (type == "linear") {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = scaling.number("factor");
    return rope;
  }
  if (type == "llama3") {
    rope.scaling = RopeScaling::kLlama3;
    rope.factor = scaling.number("factor");
    rope.low_freq_factor = scaling.number("low_freq_factor");
    rope.high_freq_factor = scaling.number("high_freq_factor");
    rope.original_context_length = scaling.number("original_max_position_embeddings");
    return rope;
  }
  scaling.refuse("expected rope_type default, linear or llama3, found {}", in_quotes(type));
}

}  // namespace

ModelConfig config_from_huggingface(const Json& json, const std::string& source) {
  const Fields fields(json, source);
  ModelConfig config;
  config.architecture = read_architecture(fields);
  config.model_name = fields.text_or("_name_or_path", "");
  if (const std::string act = fields.text_or("hidden_act", "silu"); act != "silu") {
    fields.refuse("hidden_act: expected silu, found {}", in_quotes(act));
  }
  if (fields.boolean_or("mlp_bias", false)) fields.refuse("mlp_bias: biases in the MLP are not supported");
  if (fields.find("quantization_config") != nullptr) {
    fields.refuse("quantization_config: quantised Hugging Face checkpoints are not supported; convert to GGUF");
  }
  if (fields.find("num_experts") != nullptr || fields.find("num_local_experts") != nullptr) {
    fields.refuse("mixture-of-experts models are not supported");
  }
  if (fields.number_or("partial_rotary_factor", 1.0) != 1.0) fields.refuse("partial rotary embedding is not supported");
  refuse_sliding_window(fields);

  config.num_layers = fields.integer("num_hidden_layers");
  config.dim = fields.integer("hidden_size");
  config.ffn_dim = fields.integer("intermediate_size");
  config.num_heads = fields.integer("num_attention_heads");
  config.num_kv_heads = fields.integer_or("num_key_value_heads", config.num_heads);
  config.head_dim = fields.integer_or("head_dim", config.num_heads > 0 ? config.dim / config.num_heads : 0);
  config.vocab_size = fields.integer("vocab_size");
  config.context_length = fields.integer_or("max_position_embeddings", 0);
  config.rms_eps = fields.number("rms_norm_eps");
  config.tied_embeddings = fields.boolean_or("tie_word_embeddings", false);
  config.rope = read_rope(json, fields, source);
  const bool attention_bias = fields.boolean_or("attention_bias", false);
  config.qkv_bias = config.architecture == Architecture::kQwen2 || attention_bias;
  config.output_bias = config.architecture != Architecture::kQwen2 && attention_bias;
  config.qk_norm = config.architecture == Architecture::kQwen3;
  check_config(config, source);
  return config;
}

}  // namespace sparsek::model
