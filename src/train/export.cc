#include "train/export.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"
#include "data/gguf.h"
#include "data/tokenizer_files.h"
#include "model/adapter.h"
#include "train/tensor_file.h"

namespace sparsek::train {
namespace {

nlohmann::ordered_json config_json(const model::ModelConfig& config, const char* dtype) {
  const char* architecture = config.architecture == model::Architecture::kLlama   ? "LlamaForCausalLM"
                             : config.architecture == model::Architecture::kQwen2 ? "Qwen2ForCausalLM"
                                                                                  : "Qwen3ForCausalLM";
  nlohmann::ordered_json rope = {{"rope_type", "default"}, {"rope_theta", config.rope.theta}};
  if (config.rope.scaling == model::RopeScaling::kLinear) {
    rope["rope_type"] = "linear";
    rope["factor"] = config.rope.factor;
  } else if (config.rope.scaling == model::RopeScaling::kLlama3) {
    rope["rope_type"] = "llama3";
    rope["factor"] = config.rope.factor;
    rope["low_freq_factor"] = config.rope.low_freq_factor;
    rope["high_freq_factor"] = config.rope.high_freq_factor;
    rope["original_max_position_embeddings"] = static_cast<int64_t>(config.rope.original_context_length);
  }
  return {{"architectures", {architecture}},
          {"model_type", model::name(config.architecture)},
          {"_name_or_path", config.model_name},
          {"hidden_act", "silu"},
          {"hidden_size", config.dim},
          {"intermediate_size", config.ffn_dim},
          {"num_hidden_layers", config.num_layers},
          {"num_attention_heads", config.num_heads},
          {"num_key_value_heads", config.num_kv_heads},
          {"head_dim", config.head_dim},
          {"vocab_size", config.vocab_size},
          {"max_position_embeddings", config.context_length > 0 ? config.context_length : 131072},
          {"rms_norm_eps", config.rms_eps},
          {"attention_bias", config.architecture != model::Architecture::kQwen2 && config.qkv_bias},
          {"mlp_bias", false},
          {"tie_word_embeddings", config.tied_embeddings},
          {"rope_theta", config.rope.theta},
          {"rope_parameters", rope},
          {"dtype", dtype},
          {"torch_dtype", dtype}};
}

}  // namespace

void check_exportable(const model::ModelConfig& model, const std::string& path) {
  if (model.rope.frequency_divisors.empty()) return;
  throw_data(
      "{}: expected a model that can be written as a Hugging Face folder, found one with rope_freqs (a GGUF file of "
      "Llama 3.1 or later); give its Hugging Face folder, or trainable.part=scorer",
      path);
}

void export_huggingface(const Network& network, const std::string& folder) {
  const at::NoGradGuard no_grad;
  const model::ModelConfig& config = network.config();
  check_exportable(config, folder);
  const at::ScalarType dtype = network.options().dtype == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  NamedTensors tensors;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    if (tensor.defined()) tensors.emplace_back(name, tensor.detach().to(dtype).cpu().contiguous());
  };
  const auto merged = [&](const at::Tensor& matrix, const Lora& lora) {
    if (!lora.a.defined()) return matrix;
    return matrix.to(at::kFloat) + at::matmul(lora.b, lora.a) * network.options().lora_scale;
  };
  const auto add_stack = [&](const std::string& prefix, const at::Tensor& stack,
                             std::initializer_list<std::pair<const char*, int64_t>> parts, const char* suffix) {
    int64_t row = 0;
    for (const auto& [name, rows] : parts) {
      if (stack.defined()) add(prefix + name + suffix, stack.narrow(0, row, rows));
      row += rows;
    }
  };
  const Parameters& parameters = network.parameters();
  add("model.embed_tokens.weight", parameters.embedding);
  for (size_t i = 0; i < parameters.layers.size(); ++i) {
    const LayerParameters& layer = parameters.layers[i];
    const std::string prefix = fmt::format("model.layers.{}.", i);
    const std::initializer_list<std::pair<const char*, int64_t>> qkv = {{"self_attn.q_proj", config.q_dim()},
                                                                        {"self_attn.k_proj", config.kv_dim()},
                                                                        {"self_attn.v_proj", config.kv_dim()}};
    add(prefix + "input_layernorm.weight", layer.attention_norm);
    add_stack(prefix, merged(layer.qkv, layer.qkv_lora), qkv, ".weight");
    add_stack(prefix, layer.qkv_bias, qkv, ".bias");
    add(prefix + "self_attn.q_norm.weight", layer.query_norm);
    add(prefix + "self_attn.k_norm.weight", layer.key_norm);
    add(prefix + "self_attn.o_proj.weight", merged(layer.attention_output, layer.attention_output_lora));
    add(prefix + "self_attn.o_proj.bias", layer.attention_output_bias);
    add(prefix + "post_attention_layernorm.weight", layer.ffn_norm);
    add_stack(prefix, merged(layer.gate_up, layer.gate_up_lora),
              {{"mlp.gate_proj", config.ffn_dim}, {"mlp.up_proj", config.ffn_dim}}, ".weight");
    add(prefix + "mlp.down_proj.weight", merged(layer.down, layer.down_lora));
  }
  add("model.norm.weight", parameters.final_norm);
  add("lm_head.weight", parameters.output);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw WriteError(fmt::format("{}: cannot create it: {}", folder, error.message()));
  write_tensors(folder + "/model.safetensors", tensors, {{"format", "pt"}});
  const char* dtype_name = dtype == at::kBFloat16 ? "bfloat16" : "float32";
  write_file_atomically(folder + "/config.json", config_json(config, dtype_name).dump(2) + "\n");
}

void export_adapter(const Network& network, const TrainConfig& config, const std::string& path) {
  const at::NoGradGuard no_grad;
  const model::AttentionConfig attention = attention_config(config);
  model::Adapter adapter;
  adapter.base = network.config().model_name;
  adapter.timestep_norm = config.scorer.timestep_norm;
  adapter.attention = {.topk = attention.topk,
                       .window_size = attention.window_size,
                       .num_sinks = attention.num_sinks,
                       .far_distance = attention.far_distance,
                       .layers = attention.layers,
                       .gate = attention.gate};
  const auto plain = [](const at::Tensor& x) { return x.defined() ? x.detach().cpu() : x; };
  for (const LayerParameters& layer : network.parameters().layers) {
    adapter.layers.push_back({plain(layer.scorer_hidden), plain(layer.scorer_hidden_bias), plain(layer.scorer),
                              layer.alpha.defined() ? layer.alpha.item<double>() : 0, plain(layer.beta),
                              plain(layer.gamma), plain(layer.slope)});
  }
  model::save_adapter(path, adapter, network.config());
}

void export_tokenizer(const std::string& base, const std::string& folder) {
  namespace fs = std::filesystem;
  if (!fs::is_directory(base)) {
    const TokenizerFiles files = huggingface_files(Tokenizer::from_gguf(GgufFile(base)));
    write_file_atomically(folder + "/tokenizer.json", files.tokenizer);
    write_file_atomically(folder + "/tokenizer_config.json", files.tokenizer_config);
    write_file_atomically(folder + "/generation_config.json", files.generation_config);
    return;
  }
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                           "generation_config.json"}) {
    const std::string path = base + "/" + name;
    if (!fs::exists(path)) continue;
    const MappedFile file(path);
    write_file_atomically(folder + "/" + name,
                          {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
  }
  if (!fs::exists(folder + "/tokenizer.json")) throw_data("{}: expected tokenizer.json there, found none", base);
}

void export_card(const Network& network, const TrainConfig& config, const CardFacts& facts, const std::string& path) {
  const model::ModelConfig& model = network.config();
  model::AttentionConfig attention = attention_config(config);
  attention.adapter_path = "adapter.safetensors";
  const bool has_base = !config.model.base.empty();
  std::string text = fmt::format("# {}\n\n", model.model_name.empty() ? "Model" : model.model_name);
  const auto line = [&](const char* what, const std::string& value) { text += fmt::format("- {}: {}\n", what, value); };
  line("base", has_base ? std::filesystem::path(config.model.base).filename().string() : "none, random weights");
  line("learned", config.trainable.part == "lora" ? fmt::format("lora of rank {}", config.trainable.lora_rank)
                                                  : config.trainable.part);
  line("attention", model::describe(attention));
  if (attention.kind == model::AttentionKind::kSparsek) {
    const at::Tensor& hidden = network.parameters().layers.front().scorer_hidden;  // scorer.adapter's, or scorer.hidden
    line("scorer", fmt::format("{}, timestep normalisation {}, delayed score {}",
                               hidden.defined() ? fmt::format("MLP of {}", hidden.size(0)) : "linear",
                               config.scorer.timestep_norm ? "on" : "off", config.scorer.delayed ? "on" : "off"));
  }
  const std::string teacher = config.loss.teacher.empty() ? "base" : "teacher " + config.loss.teacher;
  line("loss",
       fmt::format("next token x {}, KL to the dense {} x {}", config.loss.next_token, teacher, config.loss.kl));
  line("data", config.data.task == "shards" ? config.data.train : "task " + config.data.task);
  line("rows", config.recurrent.chunk > 0 ? fmt::format("whole documents in chunks of {}, gradients through {}",
                                                        config.recurrent.chunk, config.recurrent.bptt_chunks)
                                          : fmt::format("{} tokens", config.data.seqlen));
  line("steps", fmt::format("{} ({} left out), {} tokens, seed {}", facts.steps, facts.skipped_steps, facts.tokens,
                            config.run.seed));
  if (facts.validation) {
    line("validation", fmt::format("loss {:.4f} nats a token, next token right {:.2f} %", facts.validation->loss,
                                   100 * facts.validation->accuracy));
  }
  if (!facts.tokenizer.empty()) line("tokenizer", facts.tokenizer);
  text += "\nThe configuration is config.toml beside this folder.\n";
  write_file_atomically(path, text);
}

}  // namespace sparsek::train
