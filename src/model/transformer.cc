#include "model/transformer.h"

#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "base/error.h"
#include "base/saturate.h"
#include "data/quote.h"
#include "model/adapter.h"
#include "model/attention.h"
#include "model/checkpoint.h"
#include "model/memory_check.h"
#include "model/mlp.h"
#include "model/recorded_step.h"
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

  Workspace(const ModelConfig& config, int64_t tokens, const Placement& placement, bool has_far_rotary)
      : residual(at::empty({tokens, config.dim}, placement.options(at::kFloat))),
        normed(at::empty({tokens, config.dim}, placement.options())),
        qkv(at::empty({tokens, config.q_dim() + 2 * config.kv_dim()}, placement.options())),
        gate_up(at::empty({tokens, 2 * config.ffn_dim}, placement.options())) {
    if (has_far_rotary) {
      q_far = at::empty({tokens, config.num_heads, config.head_dim}, placement.options());
      k = at::empty({tokens, config.num_kv_heads, config.head_dim}, placement.options());
    }
  }
};

int64_t working_bytes(const ModelConfig& config, int64_t tokens, at::ScalarType dtype) {
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t per_token =
      config.dim * (4 + element) + element * (3 * config.q_dim() + 4 * config.kv_dim()) + element * 2 * config.ffn_dim;
  return tokens * per_token + kLossRows * config.vocab_size * 4;
}

// What attention by torch's own operations and the gathered rows of a chunk take on top, roughly.
int64_t plain_attention_bytes(const ModelConfig& config, const AttentionConfig& attention, const Placement& placement,
                              int64_t chunk, int64_t tokens) {
  const int64_t element = static_cast<int64_t>(c10::elementSize(placement.dtype));
  const bool is_dense = attention.kind == AttentionKind::kDense;
  int64_t visible = attention.num_sinks + attention.topk + attention.window_size;
  for (const LayerBudget& layer : attention.layers) {
    visible = std::max(visible, attention.num_sinks + layer.topk + layer.window_size);
  }
  const int64_t rows = chunk + (is_dense ? tokens : visible);
  const int64_t gathered = saturating_multiply(rows, 4 * element * (is_dense ? config.q_dim() : config.kv_dim()));
  // Masks, and with a rotary distance of its own for sinks the logits of both kinds.
  const int64_t per_pair = is_dense ? 2 * element : 16 * config.num_heads;
  return saturating_add(gathered, attention.kind == AttentionKind::kSparsek
                                      ? 0
                                      : saturating_multiply(rows, saturating_multiply(chunk, per_pair)));
}

}  // namespace

struct Transformer::Parts {
  std::string path;
  ModelConfig config;
  AttentionConfig attention_config;
  Placement placement;
  std::vector<std::string> notices;
  Weights weights;
  Rope rope;
  std::unique_ptr<Attention> attention;

  AttentionInputs project(const LayerWeights& layer, const RotaryTable& angles, int64_t documents,
                          Workspace& work) const;
  void attention_block(int64_t index, const RotaryTable& angles, int64_t position, int64_t documents, Workspace& work,
                       LayerState& state) const;
  // From ids to work.normed, the hidden states.
  void run(const at::Tensor& ids, const RotaryTable& angles, int64_t position, int64_t documents, Workspace& work,
           std::vector<LayerState>& layers) const;
  at::Tensor repeat_step(const at::Tensor& ids, int phase, DecodeState& state) const;
  RotaryTable angles_of(const std::vector<int64_t>& positions) const;
  at::Tensor logits(const at::Tensor& hidden) const;  // on the model's device
};

// A single token's way (one of each document) through the model on tensors that stay where they are: what RecordedStep
// repeats. Attention of such kinds changes a layer's tensors in place, so these layers are those of the state, too.
struct RepeatedStep {
  const void* model;
  int phase;
  at::Tensor ids, positions;  // int32, int64 [documents] on the device
  std::vector<LayerState> layers;
  Workspace work;
  std::unique_ptr<RecordedStep> step;
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

at::Device Transformer::device() const {
  return parts_->placement.device;
}

Transformer Transformer::load(const LoadOptions& options) {
  const c10::InferenceMode inference;
  Placement placement = options.placement;
  placement.plain = placement.plain || !placement.device.is_cpu();
  if (placement.dtype != at::kBFloat16 && (placement.dtype != at::kFloat || !placement.device.is_cpu())) {
    throw_field("dtype", "expected bf16{}, found {}", placement.device.is_cpu() ? " or f32" : " on a GPU",
                placement.dtype == at::kFloat ? "f32" : c10::toString(placement.dtype));
  }
  std::vector<std::string> notices;
  // Options are judged before the model is opened, and once more when the adapter's own numbers are known.
  const bool has_adapter = resolve(options.attention, nullptr, nullptr).adapter_path != "";
  const Checkpoint checkpoint = options.random_weights ? Checkpoint::random(options.path) : Checkpoint(options.path);
  const ModelConfig& config = checkpoint.config();
  Adapter adapter;
  if (has_adapter) adapter = load_adapter(options.attention.scorer, config);
  const AttentionConfig attention = resolve(options.attention, has_adapter ? &adapter.attention : nullptr, &notices);
  if (has_adapter && !adapter.base.empty() && !config.model_name.empty() && adapter.base != config.model_name) {
    notices.push_back(fmt::format("{} was made for {}; this model calls itself {}", options.attention.scorer,
                                  in_quotes(adapter.base), in_quotes(config.model_name)));
  }
  if (!placement.device.is_cpu() && attention.kind == AttentionKind::kSparsek && config.head_dim != 64 &&
      config.head_dim != 128) {
    throw_data("{}: expected heads of 64 or 128 values for sparsek attention on a GPU, found {}; read it on the CPU",
               options.path, config.head_dim);
  }
  const int64_t expected_tokens = std::max(options.expected_tokens.value_or(0), int64_t{1});
  MemoryPlan plan{.weight_bytes = planned_weight_bytes(checkpoint, placement),
                  .state_bytes = saturating_multiply(
                      options.documents, state_size_in_bytes(config, attention, placement.dtype, expected_tokens)),
                  .working_bytes = working_bytes(config, options.chunk_size, placement.dtype),
                  .device = placement.device};
  if (placement.plain) {
    plan.working_bytes += plain_attention_bytes(config, attention, placement, options.chunk_size, expected_tokens);
  }
  if (attention.kind == AttentionKind::kDense) plan.growing_tokens = expected_tokens;
  check_memory(options.path, plan, available_memory_bytes(placement.device));
  Weights weights = load_weights(checkpoint, placement);
  notices.insert(notices.end(), weights.notices.begin(), weights.notices.end());
  return Transformer(std::unique_ptr<Parts>(
      new Parts{options.path, config, attention, placement, std::move(notices), std::move(weights),
                Rope(config.rope, config.head_dim, attention.far_distance, placement),
                make_attention(config, attention, placement, has_adapter ? &adapter : nullptr, expected_tokens)}));
}

DecodeState Transformer::new_state() const {
  const c10::InferenceMode inference;
  DecodeState state;
  for (int64_t i = 0; i < parts_->config.num_layers; ++i) {
    state.layers_.push_back(parts_->attention->new_state(i));
  }
  return state;
}

DecodeState Transformer::join(const std::vector<const DecodeState*>& states) const {
  const c10::InferenceMode inference;
  const Parts& parts = *parts_;
  if (parts.attention_config.kind != AttentionKind::kSparsek) {
    throw_field("attention", "expected sparsek for documents side by side, found {}",
                name(parts.attention_config.kind));
  }
  TORCH_CHECK(!states.empty(), "join: expected at least one state, found none");
  DecodeState joined;
  joined.lengths_.clear();
  for (const DecodeState* state : states) {
    TORCH_CHECK(static_cast<int64_t>(state->layers_.size()) == parts.config.num_layers,
                "join: a state is not from this model's new_state()");
    joined.lengths_.insert(joined.lengths_.end(), state->lengths_.begin(), state->lengths_.end());
  }
  const auto [shortest, longest] = std::minmax_element(joined.lengths_.begin(), joined.lengths_.end());
  // Documents of other lengths may not change phase between them: all have to be in the last one.
  const std::optional<int> last_phase = parts.attention->step_phase(std::numeric_limits<int64_t>::max());
  TORCH_CHECK(*shortest == *longest || parts.attention->step_phase(*shortest) == last_phase,
              "join: expected documents of one length, or all of at least window_size = ",
              parts.attention_config.largest_window(), " tokens, found ", *shortest, " and ", *longest, " tokens");
  for (int64_t i = 0; i < parts.config.num_layers; ++i) {
    std::vector<ops::AttentionState> layer;
    for (const DecodeState* state : states) layer.push_back(state->layers_[i].sparsek);
    joined.layers_.push_back({.sparsek = ops::join(layer), .k = {}, .v = {}});
  }
  return joined;
}

// Normalised input to rotated queries and keys. Without far rotary everything stays in work.qkv; with it the keys
// before rotation stay there and the rotated ones go to work.k.
AttentionInputs Transformer::Parts::project(const LayerWeights& layer, const RotaryTable& angles, int64_t documents,
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
  const auto by_document = [&](const at::Tensor& x) {
    return x.view({documents, tokens / documents, x.size(1), head_dim});
  };
  AttentionInputs in;
  in.x = work.normed;
  if (attention_config.has_far_rotary()) {
    ops::rotary_out(q, rope.far().cos, rope.far().sin, work.q_far);
    ops::rotary_out(k, angles.cos, angles.sin, work.k);
    in.q_far = by_document(work.q_far);
    in.k_far = by_document(k);
    in.k = by_document(work.k);
  } else {
    ops::rotary_out(k, angles.cos, angles.sin, k);
    in.k = by_document(k);
  }
  ops::rotary_out(q, angles.cos, angles.sin, q);
  in.q = by_document(q);
  in.v = by_document(v);
  return in;
}

void Transformer::Parts::attention_block(int64_t index, const RotaryTable& angles, int64_t position, int64_t documents,
                                         Workspace& work, LayerState& state) const {
  const LayerWeights& layer = weights.layers[index];
  ops::rms_norm_out(work.residual, layer.attention_norm, config.rms_eps, work.normed);
  const AttentionInputs in = project(layer, angles, documents, work);
  const at::Tensor out = attention->forward(in, index, position, state);
  ops::linear_add_(work.residual, out.view({work.normed.size(0), config.q_dim()}), layer.attention_output);
}

void Transformer::Parts::run(const at::Tensor& ids, const RotaryTable& angles, int64_t position, int64_t documents,
                             Workspace& work, std::vector<LayerState>& layers) const {
  ops::embedding_out(ids, weights.embedding, work.residual);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerWeights& layer = weights.layers[i];
    attention_block(i, angles, position, documents, work, layers[i]);
    ops::rms_norm_out(work.residual, layer.ffn_norm, config.rms_eps, work.normed);
    mlp_add_(work.residual, work.normed, layer, work.gate_up);
  }
  ops::rms_norm_out(work.residual, weights.final_norm, config.rms_eps, work.normed);
}

at::Tensor Transformer::Parts::repeat_step(const at::Tensor& ids, int phase, DecodeState& state) const {
  for (int64_t i = 0; i < ids.size(0); ++i) {
    const int32_t id = ids.const_data_ptr<int32_t>()[i];
    TORCH_CHECK(id >= 0 && id < config.vocab_size, "token ids: expected values in [0, ", config.vocab_size, "), got ",
                id);
  }
  const int64_t documents = state.documents();
  std::shared_ptr<RepeatedStep>& step = state.step_;
  if (!step || step->model != this || step->phase != phase) {
    step = std::make_shared<RepeatedStep>(
        RepeatedStep{this, phase, at::empty({documents}, placement.options(at::kInt)),
                     at::tensor(state.lengths_, at::kLong).to(placement.device), state.layers_,
                     Workspace(config, documents, placement, attention_config.has_far_rotary()), nullptr});
    const auto work = [this, self = step.get(), position = state.length(), documents] {
      run(self->ids, rope.table(self->positions), position, documents, self->work, self->layers);
      self->positions.add_(1);
    };
    step->step = record_step(work, placement.device);
  }
  step->ids.copy_(ids, /*non_blocking=*/true);  // from pageable memory, which CUDA has read when it returns
  step->step->run();
  for (int64_t& length : state.lengths_) ++length;
  return step->work.normed.clone();  // the next step writes over it
}

// A row for each document's next token.
RotaryTable Transformer::Parts::angles_of(const std::vector<int64_t>& positions) const {
  std::vector<at::Tensor> cos, sin;
  for (const int64_t position : positions) {
    const RotaryTable row = rope.table(position, 1);
    cos.push_back(row.cos);
    sin.push_back(row.sin);
  }
  return {at::cat(cos, 0), at::cat(sin, 0)};
}

at::Tensor Transformer::forward(const at::Tensor& ids, DecodeState& state) const {
  const c10::InferenceMode inference;
  const Parts& parts = *parts_;
  const ops::PlainOperations plain(parts.placement.plain);
  TORCH_CHECK(ids.dim() == 1 && ids.size(0) > 0, "forward: expected ids [tokens], at least one, found ", ids.sizes());
  TORCH_CHECK(static_cast<int64_t>(state.layers_.size()) == parts.config.num_layers,
              "forward: the state is not from this model's new_state()");
  const int64_t tokens = ids.size(0), documents = state.documents(), position = state.length();
  TORCH_CHECK(documents == 1 || tokens == documents, "forward: expected a token of each of ", documents,
              " documents, found ", tokens, " tokens");
  if (tokens == documents && parts.placement.plain) {
    const std::optional<int> phase = parts.attention->step_phase(position);
    if (phase) return parts.repeat_step(ids, *phase, state);
  }
  state.step_.reset();
  Workspace work(parts.config, tokens, parts.placement, parts.attention_config.has_far_rotary());
  const RotaryTable angles = documents == 1 ? parts.rope.table(position, tokens) : parts.angles_of(state.lengths_);
  parts.run(ids, angles, position, documents, work, state.layers_);
  for (int64_t& length : state.lengths_) length += tokens / documents;
  return work.normed;
}

at::Tensor Transformer::Parts::logits(const at::Tensor& hidden) const {
  const ops::PlainOperations plain(placement.plain);
  at::Tensor logits = at::empty({hidden.size(0), config.vocab_size}, placement.options(at::kFloat));
  ops::linear_out(hidden, weights.output, logits);
  return logits;
}

at::Tensor Transformer::logits(const at::Tensor& hidden) const {
  const c10::InferenceMode inference;
  return parts_->logits(hidden).cpu();
}

at::Tensor Transformer::most_likely(const at::Tensor& hidden) const {
  const c10::InferenceMode inference;
  return parts_->logits(hidden).argmax(1).to(at::kInt).cpu();
}

std::vector<double> Transformer::losses(const at::Tensor& hidden, const at::Tensor& targets) const {
  const c10::InferenceMode inference;
  TORCH_CHECK(hidden.size(0) == targets.size(0), "losses: ", hidden.size(0), " hidden rows for ", targets.size(0),
              " targets");
  const ops::PlainOperations plain(parts_->placement.plain);
  std::vector<double> losses(hidden.size(0));
  for (int64_t first = 0; first < hidden.size(0); first += kLossRows) {
    const int64_t rows = std::min(kLossRows, hidden.size(0) - first);
    const at::Tensor block =
        ops::cross_entropy(parts_->logits(hidden.narrow(0, first, rows)), targets.narrow(0, first, rows));
    std::copy_n(block.const_data_ptr<double>(), rows, losses.data() + first);
  }
  return losses;
}

}  // namespace sparsek::model
