#include "model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "base/error.h"
#include "model/rope.h"
#include "tests/model/tiny_model.h"

namespace sparsek::model {
namespace {

using nlohmann::json;
using test::message_of;
using test::tiny_llama;
using testing::AllOf;
using testing::HasSubstr;

std::string refusal(const std::function<void(json&)>& damage) {
  json config = tiny_llama().config;
  damage(config);
  return message_of<DataError>([&] { config_from_huggingface(config, "dir/config.json"); });
}

TEST(HuggingFaceConfig, ReadsTheSizes) {
  const ModelConfig config = config_from_huggingface(tiny_llama().config, "config.json");
  EXPECT_EQ(config.architecture, Architecture::kLlama);
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.dim, 32);
  EXPECT_EQ(config.ffn_dim, 48);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.vocab_size, 61);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_EQ(config.num_parameters(), 61 * 32 + 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48 + 64));
}

TEST(HuggingFaceConfig, BiasesAndNormsOfEachFamily) {
  json config = tiny_llama().config;
  config["attention_bias"] = true;
  EXPECT_TRUE(config_from_huggingface(config, "c").qkv_bias);
  EXPECT_TRUE(config_from_huggingface(config, "c").output_bias);
  config.erase("attention_bias");
  config["architectures"] = {"Qwen2ForCausalLM"};
  EXPECT_TRUE(config_from_huggingface(config, "c").qkv_bias);
  EXPECT_FALSE(config_from_huggingface(config, "c").output_bias);
  config["architectures"] = {"Qwen3ForCausalLM"};
  EXPECT_TRUE(config_from_huggingface(config, "c").qk_norm);
  EXPECT_FALSE(config_from_huggingface(config, "c").qkv_bias);
}

TEST(HuggingFaceConfig, BothRopeFormats) {
  const json scaling = {{"rope_type", "llama3"},
                        {"factor", 8.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 64}};
  json now = tiny_llama().config, before = now;
  now["rope_parameters"] = scaling;
  now["rope_parameters"]["rope_theta"] = 5e5;
  before.erase("rope_parameters");
  before["rope_theta"] = 5e5;
  before["rope_scaling"] = scaling;
  for (const json& config : {now, before}) {
    const RopeConfig rope = config_from_huggingface(config, "c").rope;
    EXPECT_EQ(rope.scaling, RopeScaling::kLlama3);
    EXPECT_EQ(rope.theta, 5e5);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.original_context_length, 64.0);
  }
}

TEST(HuggingFaceConfig, RefusesByName) {
  EXPECT_THAT(refusal([](json& c) { c["architectures"] = {"MixtralForCausalLM"}; }),
              AllOf(HasSubstr("dir/config.json"), HasSubstr("MixtralForCausalLM"), HasSubstr("LlamaForCausalLM")));
  EXPECT_THAT(refusal([](json& c) { c.erase("architectures"); }), HasSubstr("architectures"));
  EXPECT_THAT(refusal([](json& c) { c["rope_parameters"]["rope_type"] = "yarn"; }), HasSubstr("'yarn'"));
  EXPECT_THAT(refusal([](json& c) { c["sliding_window"] = 4096; }), HasSubstr("sliding"));
  EXPECT_THAT(refusal([](json& c) { c["layer_types"] = {"full_attention", "sliding_attention"}; }),
              HasSubstr("sliding_attention"));
  EXPECT_THAT(refusal([](json& c) { c["num_local_experts"] = 8; }), HasSubstr("experts"));
  EXPECT_THAT(refusal([](json& c) { c["hidden_act"] = "gelu"; }), HasSubstr("gelu"));
  EXPECT_THAT(refusal([](json& c) { c["mlp_bias"] = true; }), HasSubstr("mlp_bias"));
  EXPECT_THAT(refusal([](json& c) { c["quantization_config"] = json::object(); }), HasSubstr("quantization_config"));
  EXPECT_THAT(refusal([](json& c) { c["partial_rotary_factor"] = 0.5; }), HasSubstr("rotary"));
}

TEST(HuggingFaceConfig, RefusesSenselessSizes) {
  EXPECT_THAT(refusal([](json& c) { c.erase("hidden_size"); }), HasSubstr("hidden_size"));
  EXPECT_THAT(refusal([](json& c) { c["hidden_size"] = "32"; }), HasSubstr("hidden_size"));
  EXPECT_THAT(refusal([](json& c) { c["hidden_size"] = 32.5; }), HasSubstr("hidden_size"));
  EXPECT_THAT(refusal([](json& c) { c["vocab_size"] = uint64_t{1} << 63; }), HasSubstr("vocab_size"));
  EXPECT_THAT(refusal([](json& c) { c["num_hidden_layers"] = 0; }), HasSubstr("layers"));
  EXPECT_THAT(refusal([](json& c) { c["num_hidden_layers"] = -1; }), HasSubstr("layers"));
  EXPECT_THAT(refusal([](json& c) { c["hidden_size"] = int64_t{1} << 50; }), HasSubstr("16777216"));
  EXPECT_THAT(refusal([](json& c) { c["num_attention_heads"] = 0; }), HasSubstr("heads"));
  EXPECT_THAT(refusal([](json& c) { c["num_key_value_heads"] = 3; }), HasSubstr("multiple"));
  EXPECT_THAT(refusal([](json& c) { c["head_dim"] = 12; }), HasSubstr("multiple of 8"));
  EXPECT_THAT(refusal([](json& c) { c["head_dim"] = 512; }), HasSubstr("head size"));
  EXPECT_THAT(refusal([](json& c) { c["rms_norm_eps"] = 0.0; }), HasSubstr("epsilon"));
  EXPECT_THAT(refusal([](json& c) { c["rope_parameters"]["rope_theta"] = -1.0; }), HasSubstr("rope base"));
}

// Llama 3's rule written from its wavelengths, where the code counts turns.
TEST(Rope, Llama3Frequencies) {
  RopeConfig config;
  config.theta = 5e5;
  config.scaling = RopeScaling::kLlama3;
  config.factor = 8;
  config.original_context_length = 8192;
  const std::vector<double> found = inverse_frequencies(config, 128);
  int kept = 0, stretched = 0, blended = 0;
  for (int c = 0; c < 64; ++c) {
    const double plain = std::pow(5e5, -c / 64.0), wavelength = 2 * std::numbers::pi / plain;
    double wanted = plain;
    if (wavelength > 8192.0 / 1.0) {
      wanted = plain / 8;
      ++stretched;
    } else if (wavelength > 8192.0 / 4.0) {
      const double smooth = (8192.0 / wavelength - 1.0) / 3.0;
      wanted = (1 - smooth) * plain / 8 + smooth * plain;
      ++blended;
    } else {
      ++kept;
    }
    EXPECT_NEAR(found[c] / wanted, 1.0, 1e-12) << c;
  }
  EXPECT_GT(kept, 10);
  EXPECT_GT(blended, 2);
  EXPECT_GT(stretched, 10);
}

TEST(Rope, LinearScalingAndDivisors) {
  RopeConfig config;
  config.scaling = RopeScaling::kLinear;
  config.factor = 4;
  EXPECT_DOUBLE_EQ(inverse_frequencies(config, 8)[1], 0.1 / 4);
  config = {};
  config.frequency_divisors = {1, 2, 4, 8};
  EXPECT_DOUBLE_EQ(inverse_frequencies(config, 8)[1], 0.1 / 2);
  EXPECT_DOUBLE_EQ(inverse_frequencies(config, 8)[3], 1e-3 / 8);
}

TEST(Rope, AnglesAreRightAMillionTokensIn) {
  const Rope rope(RopeConfig{}, 64, 1024);
  const RotaryTable table = rope.table(1'000'000, 2);
  for (int c = 0; c < 32; ++c) {
    const double angle = 1'000'001.0 * std::pow(10000.0, -c / 32.0);
    EXPECT_NEAR(table.cos.const_data_ptr<float>()[32 + c], std::cos(angle), 1e-6);
    EXPECT_NEAR(table.sin.const_data_ptr<float>()[32 + c], std::sin(angle), 1e-6);
    EXPECT_NEAR(rope.far().cos.const_data_ptr<float>()[c], std::cos(1024 * std::pow(10000.0, -c / 32.0)), 1e-6);
  }
}

}  // namespace
}  // namespace sparsek::model
