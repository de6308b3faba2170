// A random Hugging Face checkpoint in a temporary folder, small enough that whole models run in milliseconds, with
// hooks to damage it.
#pragma once
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "data/safetensors.h"

namespace sparsek::test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "sparsek-test-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

struct TinyTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

struct TinyModel {
  nlohmann::json config;
  std::map<std::string, TinyTensor> tensors;

  void write(const std::string& folder) const {
    std::ofstream(folder + "/config.json") << config.dump();
    std::vector<WeightView> views;
    for (const auto& [name, tensor] : tensors) {
      views.push_back({name,
                       WeightType::kF32,
                       tensor.shape,
                       {reinterpret_cast<const uint8_t*>(tensor.values.data()), tensor.values.size() * sizeof(float)}});
    }
    write_safetensors(folder + "/model.safetensors", views, {});
  }
};

inline constexpr uint64_t kTinySeed = 20240617;

// Llama: 2 layers, dim 32, 4 heads over 2 key-value heads of 8, ffn 48, vocabulary 61, tied embeddings.
inline TinyModel tiny_llama() {
  TinyModel model;
  model.config = {{"architectures", {"LlamaForCausalLM"}},
                  {"hidden_size", 32},
                  {"intermediate_size", 48},
                  {"num_hidden_layers", 2},
                  {"num_attention_heads", 4},
                  {"num_key_value_heads", 2},
                  {"vocab_size", 61},
                  {"max_position_embeddings", 128},
                  {"rms_norm_eps", 1e-5},
                  {"tie_word_embeddings", true},
                  {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 10000.0}}}};
  std::mt19937_64 generator(kTinySeed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    TinyTensor tensor{std::move(shape), std::vector<float>(count)};
    const float offset = name.find("norm") != std::string::npos ? 1.0f : 0.0f;
    for (float& value : tensor.values) value = offset + normal(generator);
    model.tensors[name] = std::move(tensor);
  };
  add("model.embed_tokens.weight", {61, 32});
  add("model.norm.weight", {32});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "input_layernorm.weight", {32});
    add(prefix + "self_attn.q_proj.weight", {32, 32});
    add(prefix + "self_attn.k_proj.weight", {16, 32});
    add(prefix + "self_attn.v_proj.weight", {16, 32});
    add(prefix + "self_attn.o_proj.weight", {32, 32});
    add(prefix + "post_attention_layernorm.weight", {32});
    add(prefix + "mlp.gate_proj.weight", {48, 32});
    add(prefix + "mlp.up_proj.weight", {48, 32});
    add(prefix + "mlp.down_proj.weight", {32, 48});
  }
  return model;
}

// The message of the exception of type Error that `action` throws; a failure text otherwise.
template <class Error>
std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
  return "no exception";
}

}  // namespace sparsek::test
