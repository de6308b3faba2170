#include "model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "base/error.h"
#include "model/memory_check.h"
#include "tests/model/tiny_model.h"

namespace sparsek::model {
namespace {

using test::message_of;
using test::TemporaryFolder;
using test::TinyModel;
using testing::AllOf;
using testing::HasSubstr;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::string refusal(const std::function<void(TinyModel&)>& damage) {
  TinyModel model = test::tiny_llama();
  damage(model);
  const TemporaryFolder folder;
  model.write(folder.path());
  return message_of<DataError>([&] { load_weights(Checkpoint(folder.path()), at::kFloat); });
}

TEST(Weights, TypesThatStayAndTypesThatAreReencoded) {
  using W = WeightType;
  for (W type : {W::kF32, W::kBF16, W::kQ4_1, W::kQ8_0}) EXPECT_EQ(packed_type({type, type}, 64, at::kBFloat16), type);
  EXPECT_EQ(packed_type({W::kQ4_0, W::kQ4_1}, 64, at::kBFloat16), W::kQ4_1);
  for (W type : {W::kQ4_K, W::kQ5_K, W::kQ6_K}) EXPECT_EQ(packed_type({type}, 256, at::kFloat), W::kQ8_0);
  EXPECT_EQ(packed_type({W::kF16}, 64, at::kBFloat16), W::kQ8_0);
  EXPECT_EQ(packed_type({W::kF16}, 64, at::kFloat), W::kF32);
  EXPECT_EQ(packed_type({W::kF16}, 40, at::kBFloat16), W::kF32);  // no whole blocks
  EXPECT_EQ(packed_type({W::kF32, W::kBF16}, 64, at::kBFloat16), W::kF32);
  EXPECT_EQ(packed_type({W::kQ4_1, W::kQ8_0}, 64, at::kBFloat16), W::kQ8_0);
}

TEST(Weights, PlanEqualsWhatIsAllocated) {
  const TemporaryFolder folder;
  test::tiny_llama().write(folder.path());
  const Checkpoint checkpoint(folder.path());
  EXPECT_EQ(load_weights(checkpoint, at::kFloat).size_in_bytes(), planned_weight_bytes(checkpoint, at::kFloat));
}

TEST(Weights, MissingMisshapenAndUnknownTensorsAreNamed) {
  const std::string up = "model.layers.1.mlp.up_proj.weight";
  EXPECT_THAT(refusal([&](TinyModel& m) { m.tensors.erase(up); }), HasSubstr(up));
  EXPECT_THAT(refusal([&](TinyModel& m) { m.tensors[up].shape = {32, 48}; }),
              AllOf(HasSubstr(up), HasSubstr("[32, 48]"), HasSubstr("[48, 32]")));
  EXPECT_THAT(refusal([&](TinyModel& m) {
                m.tensors["model.layers.0.self_attn.q_proj.bias"] = {{32}, std::vector<float>(32)};
              }),
              AllOf(HasSubstr("unknown tensor"), HasSubstr("q_proj.bias")));
}

TEST(Weights, NonFiniteWeightsAreNamed) {
  for (const char* name :
       {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"}) {
    EXPECT_THAT(refusal([&](TinyModel& m) { m.tensors[name].values.back() = kNaN; }),
                AllOf(HasSubstr(name), HasSubstr("NaN")));
    EXPECT_THAT(refusal([&](TinyModel& m) { m.tensors[name].values.front() = -INFINITY; }), HasSubstr(name));
  }
}

TEST(Weights, NonFiniteScalesOfEveryQuantisedType) {
  for (WeightType type : {WeightType::kF16, WeightType::kQ4_0, WeightType::kQ4_1, WeightType::kQ8_0, WeightType::kQ4_K,
                          WeightType::kQ5_K, WeightType::kQ6_K}) {
    const WeightLayout block = layout(type);
    std::vector<uint8_t> bytes(3 * block.block_bytes);
    const WeightView view{"w", type, {3, block.block_elements}, bytes};
    EXPECT_NO_THROW(check_finite(view, "f")) << block.name;
    // Every way to make a block's values NaN by one half-precision field must be seen.
    std::vector<float> values(block.block_elements);
    for (int offset = 0; offset + 2 <= block.block_bytes; offset += 2) {
      const uint16_t nan = 0x7e00;
      std::memcpy(&bytes[2 * block.block_bytes + offset], &nan, 2);
      dequantise(type, &bytes[2 * block.block_bytes], block.block_elements, values.data());
      bool has_nan = false;
      for (float value : values) has_nan = has_nan || std::isnan(value);
      if (has_nan) {
        EXPECT_THAT(message_of<DataError>([&] { check_finite(view, "f"); }), HasSubstr("NaN"))
            << block.name << " " << offset;
      }
      std::memset(&bytes[2 * block.block_bytes + offset], 0, 2);
    }
  }
}

TEST(MemoryCheck, SaysWhatIsNeededAndWhatIsThere) {
  const int64_t mebi = 1 << 20;
  EXPECT_NO_THROW(check_memory("m", 10 * mebi, 5 * mebi, mebi, 16 * mebi));
  EXPECT_NO_THROW(check_memory("m", int64_t{1} << 60, 0, 0, std::nullopt));
  EXPECT_THAT(message_of<DataError>([&] { check_memory("m.gguf", 10 * mebi, 5 * mebi, 2 * mebi, 16 * mebi); }),
              AllOf(HasSubstr("m.gguf"), HasSubstr("16 MiB are available")));
  EXPECT_GT(available_memory_bytes().value(), 0);
}

}  // namespace
}  // namespace sparsek::model
