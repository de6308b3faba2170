#include "model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "model/memory_check.h"
#include "model/state_size.h"
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
  return message_of<DataError>([&] { load_weights(Checkpoint(folder.path()), {.dtype = at::kFloat}); });
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
  EXPECT_EQ(load_weights(checkpoint, {.dtype = at::kFloat}).size_in_bytes(),
            planned_weight_bytes(checkpoint, {.dtype = at::kFloat}));
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
  const MemoryPlan plan{.weight_bytes = 10 * mebi, .state_bytes = 5 * mebi, .working_bytes = mebi};
  EXPECT_NO_THROW(check_memory("m", plan, 16 * mebi));
  EXPECT_NO_THROW(check_memory("m", {.weight_bytes = int64_t{1} << 60}, std::nullopt));
  EXPECT_THAT(message_of<MemoryError>([&] { check_memory("m.gguf", plan, 16 * mebi - 1); }),
              AllOf(HasSubstr("m.gguf"), HasSubstr("found 15"), HasSubstr("weights 11")));
  MemoryPlan growing = plan;
  growing.growing_tokens = 700;
  EXPECT_THAT(message_of<MemoryError>([&] { check_memory("m.gguf", growing, 0); }),
              AllOf(HasSubstr("m.gguf"), HasSubstr("state of 700 tokens")));
  EXPECT_NO_THROW(check_growth(900, mebi, mebi));
  EXPECT_THAT(message_of<MemoryError>([&] { check_growth(900, mebi + 1, mebi); }), HasSubstr("900 tokens"));
  EXPECT_GT(available_memory_bytes().value(), 0);
}

TEST(MemoryCheck, APlanThatCannotExistDoesNotWrap) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  ModelConfig config;
  config.num_layers = 30, config.num_kv_heads = 3, config.head_dim = 64;
  AttentionConfig dense;
  dense.kind = AttentionKind::kDense;
  EXPECT_EQ(state_size_in_bytes(config, dense, at::kBFloat16, 1000), 23'040'000);
  for (const int64_t tokens : {kMost, kMost - 32'807, int64_t{500'000'000'000'000}}) {
    const MemoryPlan plan{.weight_bytes = 1,
                          .state_bytes = state_size_in_bytes(config, dense, at::kBFloat16, tokens),
                          .working_bytes = 1};
    EXPECT_EQ(plan.state_bytes, kMost) << tokens;
    EXPECT_THROW(check_memory("m.gguf", plan, int64_t{1} << 50), MemoryError) << tokens;
  }
}

TEST(MemoryCheck, KnowsTheLimitOfTheAddressSpace) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_AS, &before), 0);
  std::ifstream statm("/proc/self/statm");
  int64_t pages = 0;
  statm >> pages;
  rlimit limit = before;
  limit.rlim_cur = static_cast<rlim_t>(pages * ::sysconf(_SC_PAGESIZE) + (int64_t{100} << 20));
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &limit), 0);
  const int64_t available = available_memory_bytes().value();
  ::setrlimit(RLIMIT_AS, &before);
  // 100 MiB less the reserve of 64; what the process itself maps in between is far below the slack.
  EXPECT_LE(available, int64_t{36} << 20);
  EXPECT_GE(available, int64_t{26} << 20);
}

}  // namespace
}  // namespace sparsek::model
