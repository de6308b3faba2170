// sparsek inspect: what a model file holds, and the memory a run will take, without loading the weights.
#include <fmt/format.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "data/gguf.h"
#include "data/hf_checkpoint.h"
#include "data/quote.h"
#include "model/adapter.h"
#include "model/state_size.h"

namespace sparsek::cli {
namespace {

struct TypeTotal {
  int64_t tensors = 0, parameters = 0, size_bytes = 0;
};

std::map<std::string, TypeTotal> count_types(const std::string& path) {
  std::map<std::string, TypeTotal> totals;
  const auto add = [&](const WeightView& weight) {
    TypeTotal& total = totals[name(weight.type)];
    total.tensors += 1;
    total.parameters += weight.num_elements();
    total.size_bytes += static_cast<int64_t>(weight.bytes.size());
  };
  if (std::filesystem::is_directory(path)) {
    const HfCheckpoint checkpoint(path);
    for (const std::string& tensor : checkpoint.tensor_names()) add(checkpoint.weight(tensor));
  } else {
    const GgufFile file(path);
    for (const WeightView& weight : file.tensors()) add(weight);
  }
  return totals;
}

constexpr int64_t kPlanLengths[] = {8 * 1024, 128 * 1024, 1024 * 1024};

}  // namespace

int run_inspect(const InspectConfig& config) {
  const std::string path = resolve_model(config.model.model);
  const model::ModelConfig model = model::read_model_config(path);
  const auto types = count_types(path);
  const at::ScalarType dtype = parse_dtype(config.model.dtype);
  std::vector<std::string> notices;
  const model::AttentionRequest request = attention_request(config.model);
  model::AttentionConfig attention = model::resolve(request, nullptr, nullptr);
  if (!attention.adapter_path.empty()) {
    const model::Adapter adapter = model::load_adapter(attention.adapter_path, model);
    attention = model::resolve(request, &adapter.attention, &notices);
  }
  for (const std::string& notice : notices) fmt::print(stderr, "sparsek: {}\n", notice);
  model::AttentionRequest dense_request;
  dense_request.kind = model::AttentionKind::kDense;
  const model::AttentionConfig dense = model::resolve(dense_request, nullptr, nullptr);

  if (config.json) {
    nlohmann::ordered_json tensor_types, plan = nlohmann::ordered_json::array();
    for (const auto& [type, total] : types) {
      tensor_types[type] = {{"tensors", total.tensors}, {"parameters", total.parameters}, {"bytes", total.size_bytes}};
    }
    for (const int64_t tokens : kPlanLengths) {
      plan.push_back({{"tokens", tokens},
                      {"state_bytes", state_size_in_bytes(model, attention, dtype, tokens)},
                      {"dense_cache_bytes", state_size_in_bytes(model, dense, dtype, tokens)}});
    }
    const nlohmann::ordered_json object{{"path", path},
                                        {"name", model.model_name},
                                        {"architecture", name(model.architecture)},
                                        {"layers", model.num_layers},
                                        {"dim", model.dim},
                                        {"ffn_dim", model.ffn_dim},
                                        {"num_heads", model.num_heads},
                                        {"num_kv_heads", model.num_kv_heads},
                                        {"head_dim", model.head_dim},
                                        {"vocab_size", model.vocab_size},
                                        {"context_length", model.context_length},
                                        {"parameters", model.num_parameters()},
                                        {"tensor_types", tensor_types},
                                        {"attention", describe(attention)},
                                        {"layers_topk_window", model::budgets_text(attention.layers)},
                                        {"memory_plan", plan}};
    print_json(object, 2);
    return 0;
  }

  fmt::print("{}\n", path);
  fmt::print("architecture  {}{}\n", name(model.architecture),
             model.model_name.empty() ? "" : fmt::format(" ({})", in_quotes(model.model_name)));
  fmt::print("shape         {} layers, width {}, MLP {}, {} heads over {} KV heads of {}, vocabulary {}\n",
             model.num_layers, model.dim, model.ffn_dim, model.num_heads, model.num_kv_heads, model.head_dim,
             with_separators(model.vocab_size));
  fmt::print("parameters    {}\n", with_separators(model.num_parameters()));
  if (model.context_length > 0) {
    fmt::print("trained for   {} tokens (informs, never limits)\n", with_separators(model.context_length));
  }
  for (const auto& [type, total] : types) {
    fmt::print("tensors       {:>4} of {:<5} {:>12}\n", total.tensors, type,
               human_bytes(static_cast<double>(total.size_bytes)));
  }
  fmt::print("\nattention     {}, {}\n", describe(attention), config.model.dtype);
  if (!attention.layers.empty()) fmt::print("topk+window   {}\n", model::budgets_text(attention.layers));
  fmt::print("{:>12} {:>14} {:>14}\n", "tokens", "state", "dense cache");
  for (const int64_t tokens : kPlanLengths) {
    fmt::print("{:>12} {:>14} {:>14}\n", with_separators(tokens),
               human_bytes(static_cast<double>(state_size_in_bytes(model, attention, dtype, tokens))),
               human_bytes(static_cast<double>(state_size_in_bytes(model, dense, dtype, tokens))));
  }
  return 0;
}

}  // namespace sparsek::cli
