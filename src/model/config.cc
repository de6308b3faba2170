#include "model/config.h"

#include <cmath>

#include "base/error.h"

namespace sparsek::model {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // of one dimension: products of two fit in 48 bits
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeadDim = 256;  // kernels: a multiple of 8 up to this

void check_size(const std::string& source, const char* what, int64_t value, int64_t high = kMaxSize) {
  if (value < 1 || value > high) throw_data("{}: {}: expected 1 to {}, found {}", source, what, high, value);
}

void check_positive(const std::string& source, const char* what, double value) {
  if (!(std::isfinite(value) && value > 0))
    throw_data("{}: {}: expected a positive number, found {}", source, what, value);
}

}  // namespace

const char* name(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kQwen2:
      return "qwen2";
    case Architecture::kQwen3:
      return "qwen3";
  }
  return "?";
}

int64_t ModelConfig::num_parameters() const {
  const int64_t attention = dim * (q_dim() + 2 * kv_dim()) + q_dim() * dim + (qkv_bias ? q_dim() + 2 * kv_dim() : 0) +
                            (output_bias ? dim : 0) + (qk_norm ? 2 * head_dim : 0);
  const int64_t per_layer = attention + 3 * dim * ffn_dim + 2 * dim;
  return num_layers * per_layer + dim + (tied_embeddings ? 1 : 2) * vocab_size * dim;
}

void check_config(const ModelConfig& config, const std::string& source) {
  check_size(source, "number of layers", config.num_layers, kMaxLayers);
  check_size(source, "embedding width", config.dim);
  check_size(source, "feed-forward width", config.ffn_dim);
  check_size(source, "number of heads", config.num_heads, kMaxSize / kMaxHeadDim);
  check_size(source, "number of key-value heads", config.num_kv_heads, config.num_heads);
  check_size(source, "head size", config.head_dim, kMaxHeadDim);
  check_size(source, "vocabulary size", config.vocab_size);
  if (config.num_heads % config.num_kv_heads != 0) {
    throw_data("{}: the number of heads ({}) is no multiple of the number of key-value heads ({})", source,
               config.num_heads, config.num_kv_heads);
  }
  if (config.head_dim % 8 != 0) {
    throw_data("{}: head size {} is not supported; it must be a multiple of 8", source, config.head_dim);
  }
  check_positive(source, "RMS norm epsilon", config.rms_eps);
  const RopeConfig& rope = config.rope;
  check_positive(source, "rope base", rope.theta);
  check_positive(source, "rope scaling factor", rope.factor);
  if (rope.scaling == RopeScaling::kLlama3) {
    check_positive(source, "rope low_freq_factor", rope.low_freq_factor);
    check_positive(source, "rope high_freq_factor", rope.high_freq_factor);
    check_positive(source, "rope original context length", rope.original_context_length);
    if (!(rope.high_freq_factor > rope.low_freq_factor)) {
      throw_data("{}: rope high_freq_factor ({}) must be above low_freq_factor ({})", source, rope.high_freq_factor,
                 rope.low_freq_factor);
    }
  }
  if (!rope.frequency_divisors.empty()) {
    if (static_cast<int64_t>(rope.frequency_divisors.size()) != config.head_dim / 2) {
      throw_data("{}: rope_freqs.weight: expected {} values (half a head), found {}", source, config.head_dim / 2,
                 rope.frequency_divisors.size());
    }
    for (float divisor : rope.frequency_divisors) check_positive(source, "rope_freqs.weight", divisor);
  }
}

}  // namespace sparsek::model
