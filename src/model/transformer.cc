#include "model/transformer.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "base/error.h"
#include "data/quote.h"
#include "model/adapter.h"
#include "model/attention.h"
#include "model/checkpoint.h"
#include "model/memory_check.h"
#include "model/mlp.h"
#include "model/rope.h"
#include "model/state_size.h"
#include "model/weights.h"

namespace sparsek::model {
namespace {

constexpr int64_t kLossRows = 128;  // rows of logits that exist at a time while losses are computed

// Buffers of one chunk, reused by every layer.
struct Workspace {
  at::Tensor residual;  // [tokens, dim] float32
  at::Tensor normed;    // [tokens, dim]
  at::Tensor qkv;       // [tokens, q_dim + 2 kv_dim]
  at::Tensor q_far, k;  // [tokens, heads, head_dim]: eq. 9's query, and the rotated key when k_far keeps the other
  at::Tensor gate_up;   // [tokens, 2 ffn_dim]

  Workspace(const ModelConfig& config, int64_t tokens, at::ScalarType dtype, bool has_far_rotary)
      : residual(at::empty({tokens, config.dim}, at::kFloat)),
        normed(at::empty({tokens, config.dim}, dtype)),
        qkv(at::empty({tokens, config.q_dim() + 2 * config.kv_dim()}, dtype)),
        gate_up(at::empty({tokens, 2 * config.ffn_dim}, dtype)) {
    if (has_far_rotary) {
      q_far = at::empty({tokens, config.num_heads, config.head_dim}, dtype);
      k = at::empty({tokens, config.num_kv_heads, config.head_dim}, dtype);
    }
  }
};

int64_t working_bytes(const ModelConfig& config, int64_t tokens, at::ScalarType dtype) {
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t per_token =
      config.dim * (4 + element) + element * (3 * config.q_dim() + 4 * config.kv_dim()) + element * 2 * config.ffn_dim;
  return tokens * per_token + kLossRows * config.vocab_size * 4;
}

}  // namespace

struct Transformer::Parts {
  std::string path;
  ModelConfig config;
  AttentionConfig attention_config;
  at::ScalarType dtype;
  std::vector<std::string> notices;
  Weights weights;
  Rope rope;
  std::unique_ptr<Attention> attention;

  AttentionInputs project(const LayerWeights& layer, const RotaryTable& angles, Workspace& work) const;
  void attention_block(int64_t index, const RotaryTable& angles, int64_t position, Workspace& work,
                       LayerState& state) const;
};

Transformer::Transformer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Transformer::~Transformer() = default;
Transformer::Transformer(Transformer&&) noexcept = default;
Transformer& Transformer::operator=(Transformer&&) noexcept = default;

const std::string& Transformer::path() const {
  return parts_->path;
}
const ModelConfig& Transformer::config() const {
  return parts_->config;
}
const AttentionConfig& Transformer::attention() const {
  return parts_->attention_config;
}
const std::vector<std::string>& Transformer::notices() const {
  return parts_->notices;
}
int64_t Transformer::weight_bytes() const {
  return parts_->weights.size_in_bytes();
}

Transformer Transformer::load(const LoadOptions& options) {
  const c10::InferenceMode inference;
  if (options.dtype != at::kFloat && options.dtype != at::kBFloat16) {
    throw_field("dtype", "expected bf16 or f32, found {}", c10::toString(options.dtype));
  }
  std::vector<std::string> notices;
  // Options are judged before the model is opened, and once more when the adapter's own numbers are known.
  const bool has_adapter = resolve(options.attention, nullptr, nullptr).adapter_path != "";
  const Checkpoint checkpoint(options.path);
  const ModelConfig& config = checkpoint.config();
  Adapter adapter;
  if (has_adapter) adapter = load_adapter(options.attention.scorer, config);
  const AttentionConfig attention = resolve(options.attention, has_adapter ? &adapter.attention : nullptr, &notices);
  if (has_adapter && !adapter.base.empty() && !config.model_name.empty() && adapter.base != config.model_name) {
    notices.push_back(fmt::format("{} was made for {}; this model calls itself {}", options.attention.scorer,
                                  in_quotes(adapter.base), in_quotes(config.model_name)));
  }
  const int64_t expected_tokens = std::max(options.expected_tokens.value_or(0), int64_t{1});
  MemoryPlan plan{.weight_bytes = planned_weight_bytes(checkpoint, options.dtype),
                  .state_bytes = state_size_in_bytes(config, attention, options.dtype, expected_tokens),
                  .working_bytes = working_bytes(config, options.chunk_size, options.dtype)};
  if (attention.kind == AttentionKind::kDense) plan.growing_tokens = expected_tokens;
  check_memory(options.path, plan, available_memory_bytes());
  Weights weights = load_weights(checkpoint, options.dtype);
  notices.insert(notices.end(), weights.notices.begin(), weights.notices.end());
  return Transformer(std::unique_ptr<Parts>(
      new Parts{options.path, config, attention, options.dtype, std::move(notices), std::move(weights),
                Rope(config.rope, config.head_dim, attention.far_distance),
                make_attention(config, attention, options.dtype, has_adapter ? &adapter : nullptr, expected_tokens)}));
}

DecodeState Transformer::new_state() const {
  const c10::InferenceMode inference;
  DecodeState state;
  for (int64_t i = 0; i < parts_->config.num_layers; ++i) state.layers_.push_back(parts_->attention->new_state());
  return state;
}

// Normalised input to rotated queries and keys. Without far rotary everything stays in work.qkv; with it the keys
// before rotation stay there and the rotated ones go to work.k.
AttentionInputs Transformer::Parts::project(const LayerWeights& layer, const RotaryTable& angles,
                                            Workspace& work) const {
  const int64_t tokens = work.qkv.size(0), head_dim = config.head_dim;
  ops::linear_out(work.normed, layer.qkv, work.qkv);
  const auto heads = [&](int64_t first, int64_t count) {
    return work.qkv.narrow(1, first, count * head_dim).view({tokens, count, head_dim});
  };
  at::Tensor q = heads(0, config.num_heads);
  at::Tensor k = heads(config.q_dim(), config.num_kv_heads);
  const at::Tensor v = heads(config.q_dim() + config.kv_dim(), config.num_kv_heads);
  if (config.qk_norm) {
    ops::head_norm_(q, layer.query_norm, config.rms_eps);
    ops::head_norm_(k, layer.key_norm, config.rms_eps);
  }
  AttentionInputs in;
  in.x = work.normed;
  if (attention_config.has_far_rotary()) {
    ops::rotary_out(q, rope.far().cos, rope.far().sin, work.q_far);
    ops::rotary_out(k, angles.cos, angles.sin, work.k);
    in.q_far = work.q_far.unsqueeze(0);
    in.k_far = k.unsqueeze(0);
    in.k = work.k.unsqueeze(0);
  } else {
    ops::rotary_out(k, angles.cos, angles.sin, k);
    in.k = k.unsqueeze(0);
  }
  ops::rotary_out(q, angles.cos, angles.sin, q);
  in.q = q.unsqueeze(0);
  in.v = v.unsqueeze(0);
  return in;
}

void Transformer::Parts::attention_block(int64_t index, const RotaryTable& angles, int64_t position, Workspace& work,
                                         LayerState& state) const {
  const LayerWeights& layer = weights.layers[index];
  ops::rms_norm_out(work.residual, layer.attention_norm, config.rms_eps, work.normed);
  const AttentionInputs in = project(layer, angles, work);
  const at::Tensor out = attention->forward(in, index, position, state);
  ops::linear_add_(work.residual, out.view({out.size(1), config.q_dim()}), layer.attention_output);
}

at::Tensor Transformer::forward(const at::Tensor& ids, DecodeState& state) const {
  const c10::InferenceMode inference;
  const Parts& parts = *parts_;
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) > 0, "forward: expected ids [tokens], at least one, found ", ids.sizes());
  TORCH_CHECK(static_cast<int64_t>(state.layers_.size()) == parts.config.num_layers,
              "forward: the state is not from this model's new_state()");
  const int64_t tokens = ids.size(0);
  Workspace work(parts.config, tokens, parts.dtype, parts.attention_config.has_far_rotary());
  ops::embedding_out(ids, parts.weights.embedding, work.residual);
  const RotaryTable angles = parts.rope.table(state.length_, tokens);
  for (int64_t i = 0; i < parts.config.num_layers; ++i) {
    const LayerWeights& layer = parts.weights.layers[i];
    parts.attention_block(i, angles, state.length_, work, state.layers_[i]);
    ops::rms_norm_out(work.residual, layer.ffn_norm, parts.config.rms_eps, work.normed);
    mlp_add_(work.residual, work.normed, layer, work.gate_up);
  }
  state.length_ += tokens;
  ops::rms_norm_out(work.residual, parts.weights.final_norm, parts.config.rms_eps, work.normed);
  return work.normed;
}

at::Tensor Transformer::logits(const at::Tensor& hidden) const {
  const c10::InferenceMode inference;
  at::Tensor logits = at::empty({hidden.size(0), parts_->config.vocab_size}, at::kFloat);
  ops::linear_out(hidden, parts_->weights.output, logits);
  return logits;
}

std::vector<double> Transformer::losses(const at::Tensor& hidden, const at::Tensor& targets) const {
  const c10::InferenceMode inference;
  TORCH_CHECK(hidden.size(0) == targets.size(0), "losses: ", hidden.size(0), " hidden rows for ", targets.size(0),
              " targets");
  std::vector<double> losses(hidden.size(0));
  for (int64_t first = 0; first < hidden.size(0); first += kLossRows) {
    const int64_t rows = std::min(kLossRows, hidden.size(0) - first);
    const at::Tensor block = ops::cross_entropy(logits(hidden.narrow(0, first, rows)), targets.narrow(0, first, rows));
    std::copy_n(block.const_data_ptr<double>(), rows, losses.data() + first);
  }
  return losses;
}

}  // namespace sparsek::model
