// ModelConfig from GGUF metadata.
#include "base/error.h"
#include "data/gguf.h"
#include "data/quote.h"
#include "model/config.h"

namespace sparsek::model {
namespace {

Architecture read_architecture(const GgufFile& file, const std::string& source) {
  const std::string_view found = file.get_string("general.architecture");
  for (Architecture architecture : {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    if (found == name(architecture)) return architecture;
  }
  throw_data("{}: expected architecture llama, qwen2 or qwen3, found {}; this model is not supported", source,
             in_quotes(found));
}

RopeConfig read_rope(const GgufFile& file, const std::string& prefix, int64_t head_dim, const std::string& source) {
  RopeConfig rope;
  rope.theta = file.find_float(prefix + "rope.freq_base").value_or(rope.theta);
  const int64_t rotary_dim = file.find_int(prefix + "rope.dimension_count").value_or(head_dim);
  if (rotary_dim != head_dim) {
    throw_data("{}: partial rotary embedding ({} of {} channels) is not supported", source, rotary_dim, head_dim);
  }
  const std::string type(file.find_string(prefix + "rope.scaling.type").value_or("none"));
  if (type == "linear") {
    rope.scaling = RopeScaling::kLinear;
    rope.factor = file.get_float(prefix + "rope.scaling.factor");
  } else if (type != "none") {
    throw_data("{}: expected rope scaling none, linear, or llama3 as rope_freqs.weight, found {}", source,
               in_quotes(type));
  } else if (const double scale = file.find_float(prefix + "rope.scale_linear").value_or(1.0); scale != 1.0) {
    rope.scaling = RopeScaling::kLinear;  // the key of older files
    rope.factor = scale;
  }
  if (const WeightView* divisors = file.find_tensor("rope_freqs.weight")) {
    rope.frequency_divisors.resize(divisors->num_elements());
    if (divisors->type != WeightType::kF32) {
      throw_data("{}: tensor rope_freqs.weight: expected type F32, found {}", source, sparsek::name(divisors->type));
    }
    dequantise(divisors->type, divisors->bytes.data(), divisors->num_elements(), rope.frequency_divisors.data());
  }
  return rope;
}

}  // namespace

ModelConfig config_from_gguf(const GgufFile& file, const std::string& source) {
  ModelConfig config;
  config.architecture = read_architecture(file, source);
  const std::string prefix = std::string(name(config.architecture)) + ".";
  if (file.find_int(prefix + "expert_count").value_or(0) > 0) {
    throw_data("{}: mixture-of-experts models are not supported ({}expert_count is {})", source, prefix,
               file.get_int(prefix + "expert_count"));
  }
  if (file.find_int(prefix + "attention.sliding_window").value_or(0) > 0) {
    throw_data("{}: sliding window attention ({}attention.sliding_window {}) is not supported", source, prefix,
               file.get_int(prefix + "attention.sliding_window"));
  }
  config.model_name = std::string(file.find_string("general.name").value_or(""));
  config.num_layers = file.get_int(prefix + "block_count");
  config.dim = file.get_int(prefix + "embedding_length");
  config.ffn_dim = file.get_int(prefix + "feed_forward_length");
  config.num_heads = file.get_int(prefix + "attention.head_count");
  config.num_kv_heads = file.find_int(prefix + "attention.head_count_kv").value_or(config.num_heads);
  const int64_t even_split = config.num_heads > 0 ? config.dim / config.num_heads : 0;
  config.head_dim = file.find_int(prefix + "attention.key_length").value_or(even_split);
  if (const int64_t value_dim = file.find_int(prefix + "attention.value_length").value_or(config.head_dim);
      value_dim != config.head_dim) {
    throw_data("{}: values of another head size ({}) than keys ({}) are not supported", source, value_dim,
               config.head_dim);
  }
  config.context_length = file.find_int(prefix + "context_length").value_or(0);
  config.rms_eps = file.get_float(prefix + "attention.layer_norm_rms_epsilon");
  const WeightView& embedding = file.tensor("token_embd.weight");
  if (embedding.shape.size() != 2) {
    throw_data("{}: tensor token_embd.weight: expected two dimensions, found shape {}", source,
               shape_text(embedding.shape));
  }
  config.vocab_size = file.find_int(prefix + "vocab_size").value_or(embedding.shape[0]);
  config.tied_embeddings = file.find_tensor("output.weight") == nullptr;
  config.qkv_bias = config.architecture == Architecture::kQwen2 || file.find_tensor("blk.0.attn_q.bias") != nullptr;
  config.output_bias = file.find_tensor("blk.0.attn_output.bias") != nullptr;
  config.qk_norm = config.architecture == Architecture::kQwen3;
  config.rope = read_rope(file, prefix, config.head_dim, source);
  check_config(config, source);
  return config;
}

}  // namespace sparsek::model
