#include "model/state_size.h"

#include "base/saturate.h"

namespace sparsek::model {
namespace {

int64_t size_of(at::ScalarType dtype) {
  return static_cast<int64_t>(c10::elementSize(dtype));
}

}  // namespace

ops::AttentionStateOptions state_options(const ModelConfig& config, const AttentionConfig& attention,
                                         at::ScalarType dtype) {
  ops::AttentionStateOptions options;
  options.num_kv_heads = config.num_kv_heads;
  options.head_dim = config.head_dim;
  options.topk = attention.topk;
  options.window_size = attention.window_size;
  options.num_sinks = attention.num_sinks;
  options.far_rotary = attention.has_far_rotary();
  options.delayed_scores = attention.delayed_scores;
  options.dtype = dtype;
  return options;
}

int64_t state_size_in_bytes(const ops::AttentionStateOptions& options) {
  const int64_t k = options.topk, w = options.window_size, s = options.num_sinks;
  const int64_t score = options.dtype == at::kDouble ? 8 : 4;
  int64_t pool = options.pool_size.value_or(ops::default_pool_size(k));
  if (pool == 0) pool = k;  // without a limit the pool grows beyond its slots; this is how it starts
  const int64_t rows = options.head_dim * size_of(options.dtype) * (2 * (s + w + k) + (options.far_rotary ? w : 0));
  const int64_t scores = score * (k + pool + w + (options.delayed_scores ? w : 0));
  const int64_t positions = 8 * k, statistics = 3 * 8, length = 8;
  return options.batch * (options.num_kv_heads * (rows + scores + positions + statistics) + length);
}

int64_t state_size_in_bytes(const ModelConfig& config, const AttentionConfig& attention, at::ScalarType dtype,
                            int64_t tokens) {
  if (attention.kind == AttentionKind::kSparsek) {
    int64_t total = 0;
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      total += state_size_in_bytes(state_options(config, attention.of_layer(layer), dtype));
    }
    return total;
  }
  const int64_t rows = attention.kind == AttentionKind::kDense ? tokens : attention.num_sinks + attention.window_size;
  return saturating_multiply(rows, config.num_layers * 2 * config.kv_dim() * size_of(dtype));
}

}  // namespace sparsek::model
