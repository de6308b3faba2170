// The shape of a model of the Llama family, read from GGUF metadata or a Hugging Face config.json. Everything this
// program does not compute (another architecture, another rope scaling, sliding windows, experts, ...) is refused by
// name, here and only here.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace sparsek {
class GgufFile;
}

namespace sparsek::model {

enum class Architecture : uint8_t { kLlama, kQwen2, kQwen3 };
const char* name(Architecture architecture);  // "llama", "qwen2", "qwen3"

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3 };

struct RopeConfig {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;           // linear, llama3: long wavelengths are divided by it
  double low_freq_factor = 1.0;  // llama3 only, as the next two
  double high_freq_factor = 4.0;
  double original_context_length = 8192.0;
  std::vector<float> frequency_divisors;  // [head_dim / 2] or empty: GGUF's rope_freqs.weight
};

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  std::string model_name;  // for people; may be empty
  int64_t num_layers = 0;
  int64_t dim = 0;      // width of the residual stream
  int64_t ffn_dim = 0;  // inner width of the gated MLP
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t context_length = 0;  // what it was trained for; 0: not stated. Informs, never limits
  double rms_eps = 1e-5;
  RopeConfig rope;
  bool qkv_bias = false;
  bool output_bias = false;      // of the attention's output projection
  bool qk_norm = false;          // RMS norm of each query and key head before rotation
  bool tied_embeddings = false;  // logits use the embedding matrix

  int64_t q_dim() const { return num_heads * head_dim; }
  int64_t kv_dim() const { return num_kv_heads * head_dim; }
  // Of all weights, norms included.
  int64_t num_parameters() const;
};

// `source` is the file's name in error messages. All three throw DataError naming it.
ModelConfig config_from_gguf(const GgufFile& file, const std::string& source);
ModelConfig config_from_huggingface(const nlohmann::json& config, const std::string& source);
// Sizes positive and within bounds that keep every product of them inside int64, heads that divide, head_dim that the
// kernels have, finite positive rope numbers.
void check_config(const ModelConfig& config, const std::string& source);

// The config of `path`: a GGUF file, or a Hugging Face directory (or its config.json).
ModelConfig read_model_config(const std::string& path);

}  // namespace sparsek::model
