#include "train/session.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cmath>

#include "base/error.h"
#include "data/quote.h"
#include "model/config.h"
#include "ops/ops.h"

namespace sparsek::train {
namespace {

AttentionSettings settings_of(const TrainConfig& config) {
  AttentionSettings settings;
  settings.attention = attention_config(config);
  if (config.attention.pool_size >= 0) settings.pool_size = config.attention.pool_size;
  settings.timestep_norm = config.scorer.timestep_norm;
  settings.cut_gradient = config.scorer.cut_gradient;
  settings.dense_cache = config.recurrent.dense_cache;
  return settings;
}

bool is_learned(const TrainConfig& config, const std::string& name, Group group) {
  if (name.ends_with(".slope") && !config.scorer.learn_slope) return false;
  if (is_of_scorer(group)) return true;
  if (config.trainable.part == "lora") return name.find(".lora_") != std::string::npos;
  return config.trainable.part == "full";
}

// A dense model on tensors that are not trained: shared with the network's where those stay as they are.
Network make_teacher(const model::ModelConfig& config, const Parameters& base, const AttentionSettings& settings,
                     const NetworkOptions& options, bool is_shared) {
  Parameters parameters = base;
  visit_parameters(parameters, [&](const std::string&, at::Tensor& tensor, Group group) {
    const at::Tensor value = tensor.detach();
    const at::ScalarType dtype = group == Group::kMatrix ? options.dtype : value.scalar_type();
    tensor = is_shared ? value.to(dtype) : value.to(dtype, /*non_blocking=*/false, /*copy=*/true);
  });
  AttentionSettings dense;
  dense.attention.kind = model::AttentionKind::kDense;
  dense.dense_cache = settings.dense_cache;
  return Network(config, std::move(parameters), dense, {.dtype = options.dtype, .device = options.device});
}

// What loss.teacher names, for a model of `config`.
Network named_teacher(const TrainConfig& run, const model::ModelConfig& config, const AttentionSettings& settings,
                      const NetworkOptions& options) {
  const std::string& path = run.loss.teacher;
  const model::ModelConfig found = model::read_model_config(path);
  const auto check = [&](const char* what, int64_t expected, int64_t value) {
    if (value == expected) return;
    throw_field("loss.teacher", "expected the trained model's {} {}, found {} in {}", what, expected, value, path);
  };
  check("vocabulary of", config.vocab_size, found.vocab_size);
  if (run.warm_start.steps > 0 || holds_lookup_heads(run)) {  // which look at its layers one by one
    check("number of layers,", config.num_layers, found.num_layers);
    check("width,", config.dim, found.dim);
    check("number of heads,", config.num_heads, found.num_heads);
    check("number of KV heads,", config.num_kv_heads, found.num_kv_heads);
    check("width of a head,", config.head_dim, found.head_dim);
  }
  return make_teacher(found, base_parameters(path), settings, options, /*is_shared=*/true);
}

}  // namespace

at::Device parse_device(const std::string& text) {
  const bool is_cpu = text == "cpu";
  if (!is_cpu && text != "cuda" && !text.starts_with("cuda:")) {
    throw_field("run.device", "expected cpu, cuda or cuda:N, found {}", in_quotes(text));
  }
  if (is_cpu) return at::kCPU;
  if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) {
    throw_field("run.device", "expected cpu: this program was built without CUDA, found {}", in_quotes(text));
  }
  if (!ops::has_kernels(at::kCUDA)) {
    throw_field("run.device", "expected cpu: this program was built without the CUDA kernels, found {}",
                in_quotes(text));
  }
  try {
    at::Device device(text);
    if (!device.has_index()) device.set_index(0);
    const auto count = c10::impl::getDeviceGuardImpl(at::kCUDA)->deviceCount();
    if (device.index() < count) return device;
    throw_field("run.device", "expected one of {} devices, found {}", count, in_quotes(text));
  } catch (const c10::Error&) {
    throw_field("run.device", "expected cpu, cuda or cuda:N, found {}", in_quotes(text));
  }
}

at::ScalarType parse_dtype(const std::string& text) {
  return text == "bf16" ? at::kBFloat16 : at::kFloat;
}

Sizes scheduled_sizes(const TrainConfig& config, int64_t step) {
  const ScheduleOptions& schedule = config.schedule;
  const auto at_step = [&](int64_t from, int64_t to) -> int64_t {
    if (from == 0 || step >= schedule.anneal_steps) return to;
    const double done = static_cast<double>(step) / static_cast<double>(schedule.anneal_steps);
    return from + std::llround(done * static_cast<double>(to - from));
  };
  return {at_step(schedule.topk_from, config.attention.topk),
          at_step(schedule.window_from, config.attention.window_size)};
}

Session open_session(const TrainConfig& config) {
  const bool has_base = !config.model.base.empty();
  const model::ModelConfig model = has_base ? model::read_model_config(config.model.base) : model_config(config.model);
  const Parameters base =
      has_base ? base_parameters(config.model.base) : random_parameters(model, config.model, config.run.seed);
  Parameters parameters = base;
  if (config.attention.kind == "sparsek") add_scorers(parameters, model, config.scorer, config.run.seed);
  if (config.trainable.part == "lora") add_lora(parameters, config.trainable.lora_rank, config.run.seed);

  NetworkOptions options;
  options.dtype = parse_dtype(config.run.dtype);
  options.device = parse_device(config.run.device);
  if (!options.device.is_cpu() && options.dtype != at::kBFloat16) {
    throw_field("run.dtype", "expected bf16 on a GPU, found {}", config.run.dtype);
  }
  options.recompute = config.trainable.recompute;
  options.lora_scale = config.trainable.lora_alpha / static_cast<double>(config.trainable.lora_rank);
  visit_parameters(parameters, [&](const std::string& name, at::Tensor& tensor, Group group) {
    if (is_learned(config, name, group)) {
      tensor = tensor.detach().requires_grad_(true);
    } else if (group == Group::kMatrix) {
      tensor = tensor.to(options.device, options.dtype);
    }
  });
  const AttentionSettings settings = settings_of(config);
  const auto num_budgets = static_cast<int64_t>(settings.attention.layers.size());
  if (num_budgets > 0 && num_budgets != model.num_layers) {
    throw_field("attention.layers", "expected budgets of {} layers, found {}", model.num_layers, num_budgets);
  }
  std::optional<Network> teacher;
  const bool needs_teacher = learns_from_teacher(config) || config.warm_start.steps > 0 || holds_lookup_heads(config);
  if (needs_teacher && !config.loss.teacher.empty()) {
    teacher = named_teacher(config, model, settings, options);
  } else if (needs_teacher) {
    const bool is_shared = config.trainable.part != "full";
    Parameters frozen = is_shared ? parameters : base;
    for (LayerParameters& layer : frozen.layers) {
      layer.qkv_lora = layer.attention_output_lora = layer.gate_up_lora = layer.down_lora = Lora();
      layer.scorer_hidden = layer.scorer_hidden_bias = layer.scorer = at::Tensor();
      layer.alpha = layer.beta = layer.gamma = layer.slope = at::Tensor();
    }
    teacher = make_teacher(model, frozen, settings, options, is_shared);
  }
  return {Network(model, std::move(parameters), settings, options), std::move(teacher)};
}

}  // namespace sparsek::train
