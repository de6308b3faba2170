#include "model/attention_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "tests/model/tiny_model.h"

namespace sparsek::model {
namespace {

using test::message_of;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

std::string refusal(const AttentionRequest& request) {
  return message_of<UsageError>([&] { resolve(request, nullptr, nullptr); });
}

TEST(AttentionConfig, DefaultsOfEachKind) {
  const AttentionConfig sparsek = resolve({}, nullptr, nullptr);
  EXPECT_EQ(describe(sparsek), fmt::format("sparsek topk 124 window 896 sinks 4 gate hard scorer window_mass slope {} "
                                           "far-distance 1024",
                                           kWindowMassSlope));
  const AttentionConfig window = resolve({.kind = AttentionKind::kWindow}, nullptr, nullptr);
  EXPECT_EQ(describe(window), "window window 1020 sinks 4 far-distance 1024");
  EXPECT_EQ(describe(resolve({.kind = AttentionKind::kDense}, nullptr, nullptr)), "dense");
}

TEST(AttentionConfig, FarDistanceFollowsTheSizesUnlessGiven) {
  EXPECT_EQ(resolve({.topk = 10, .window_size = 20, .num_sinks = 3}, nullptr, nullptr).far_distance, 33);
  const AttentionConfig off = resolve({.far_distance = 0}, nullptr, nullptr);
  EXPECT_FALSE(off.has_far_rotary());
  EXPECT_THAT(describe(off), HasSubstr("far-distance off"));
}

TEST(AttentionConfig, SlopeIsTheScorersUnlessGiven) {
  EXPECT_EQ(AttentionConfig{}.slope, kWindowMassSlope);
  EXPECT_EQ(resolve({}, nullptr, nullptr).slope, kWindowMassSlope);
  EXPECT_EQ(resolve({.scorer = "key_norm"}, nullptr, nullptr).slope, kKeyNormSlope);
  const AttentionConfig given = resolve({.scorer = "key_norm", .slope = 0.25}, nullptr, nullptr);
  EXPECT_EQ(given.slope, 0.25);
  EXPECT_THAT(describe(given), HasSubstr("scorer key_norm slope 0.25"));
}

TEST(AttentionConfig, NamesTheOptionThatIsOutOfRange) {
  EXPECT_THAT(refusal({.topk = 0}), AllOf(StartsWith("topk: "), HasSubstr("found 0")));
  EXPECT_THAT(refusal({.topk = int64_t{1} << 40}), StartsWith("topk: "));
  EXPECT_THAT(refusal({.window_size = 0}), StartsWith("window_size: "));
  EXPECT_THAT(refusal({.num_sinks = -1}), StartsWith("num_sinks: "));
  EXPECT_THAT(refusal({.far_distance = -5}), StartsWith("far_distance: "));
  EXPECT_THAT(refusal({.scorer = ""}), StartsWith("scorer: "));
  for (const double slope : {-0.5, double{NAN}, double{INFINITY}}) {
    EXPECT_THAT(refusal({.slope = slope}), StartsWith("slope: "));
  }
}

TEST(AttentionConfig, RefusesOptionsThatDoNotApply) {
  EXPECT_THAT(refusal({.kind = AttentionKind::kWindow, .topk = 4}), AllOf(StartsWith("topk: "), HasSubstr("window")));
  EXPECT_THAT(refusal({.kind = AttentionKind::kWindow, .gate = Gate::kSoft}), StartsWith("gate: "));
  EXPECT_THAT(refusal({.kind = AttentionKind::kWindow, .scorer = "key_norm"}), StartsWith("scorer: "));
  EXPECT_THAT(refusal({.kind = AttentionKind::kWindow, .slope = 1}), StartsWith("slope: "));
  EXPECT_THAT(refusal({.scorer = "a.safetensors", .slope = 1}), AllOf(StartsWith("slope: "), HasSubstr("adapter")));
  EXPECT_THAT(refusal({.kind = AttentionKind::kDense, .window_size = 4}), StartsWith("window_size: "));
  EXPECT_THAT(refusal({.kind = AttentionKind::kDense, .num_sinks = 4}), StartsWith("num_sinks: "));
  EXPECT_THAT(refusal({.kind = AttentionKind::kDense, .far_distance = 4}), StartsWith("far_distance: "));
}

TEST(AttentionConfig, AdapterProposesAndTheUserOverrides) {
  AttentionDefaults adapter;
  adapter.topk = 100;
  adapter.window_size = 50;
  adapter.num_sinks = 2;
  adapter.far_distance = 0;
  adapter.gate = Gate::kSoft;
  std::vector<std::string> notices;
  const AttentionConfig config = resolve({.window_size = 60, .scorer = "a.safetensors"}, &adapter, &notices);
  EXPECT_EQ(describe(config), "sparsek topk 100 window 60 sinks 2 gate soft scorer a.safetensors far-distance off");
  EXPECT_THAT(notices, ElementsAre("window_size 60 overrides the adapter's 50"));
}

TEST(AttentionConfig, FarKeysStayBeyondALargerWindow) {
  AttentionDefaults adapter;
  adapter.topk = 100;
  adapter.window_size = 50;
  adapter.num_sinks = 2;
  adapter.far_distance = 152;
  const auto distance = [&](AttentionRequest request, std::vector<std::string>* notices = nullptr) {
    request.scorer = "a.safetensors";
    return resolve(request, &adapter, notices).far_distance;
  };
  EXPECT_EQ(distance({}), 152);
  EXPECT_EQ(distance({.window_size = 20}), 152);  // what the adapter was trained with
  std::vector<std::string> notices;
  EXPECT_EQ(distance({.window_size = 4096}, &notices), 4198);
  ASSERT_EQ(notices.size(), 2u);
  EXPECT_THAT(notices[1], AllOf(HasSubstr("far_distance 4198"), HasSubstr("152")));
  EXPECT_EQ(distance({.window_size = 4096, .far_distance = 700}), 700);
  EXPECT_EQ(distance({.window_size = 4096, .far_distance = 0}), 0);
}

TEST(AttentionConfig, LayersHaveTheirOwnBudgets) {
  const std::vector<LayerBudget> layers = {{8, 12}, {30, 5}, {9, 13}};
  EXPECT_EQ(budgets_text(layers), "8+12, 30+5, 9+13");
  EXPECT_EQ(parse_budgets("layers", "8+12, 30+5, 9+13"), layers);
  EXPECT_EQ(parse_budgets("layers", " 8 + 12,30+5 ,9+13 "), layers);
  for (const char* bad : {"", " ", "8", "8+", "8+12,", ",8+12", "8+12 30+5", "8+12;30+5", "0+12", "8+0", "-8+12",
                          "8+12x", "8++12", "8+1048577", "99999999999999999999+1"}) {
    EXPECT_THAT(message_of<UsageError>([&] { parse_budgets("attention.layers", bad); }),
                AllOf(StartsWith("attention.layers: "), HasSubstr("topk+window")))
        << bad;
  }
  EXPECT_EQ(mean_budget(layers), (LayerBudget{16, 10}));  // 47 / 3, 30 / 3

  AttentionDefaults adapter;
  adapter.topk = 16;
  adapter.window_size = 10;
  adapter.num_sinks = 2;
  adapter.layers = layers;
  const AttentionConfig config = resolve({.scorer = "a.safetensors"}, &adapter, nullptr);
  EXPECT_EQ(config.layers, layers);
  EXPECT_EQ(config.far_distance, 28);
  EXPECT_EQ(config.largest_window(), 13);
  EXPECT_EQ(config.of_layer(1).topk, 30);
  EXPECT_EQ(config.of_layer(1).window_size, 5);
  EXPECT_EQ(config.of_layer(2).window_size, 13);
  EXPECT_THAT(describe(config), HasSubstr("topk 16 window 10 sinks 2 (means of layers with 22 to 37 keys)"));

  std::vector<std::string> notices;
  const AttentionConfig wider = resolve({.window_size = 20, .scorer = "a.safetensors"}, &adapter, &notices);
  EXPECT_EQ(wider.layers, (std::vector<LayerBudget>{{8, 20}, {30, 20}, {9, 20}}));
  EXPECT_EQ(wider.window_size, 20);
  EXPECT_THAT(notices, ElementsAre("window_size 20 in every layer instead of the adapter's own"));
  const AttentionConfig alike = resolve({.topk = 7, .window_size = 20, .scorer = "a.safetensors"}, &adapter, nullptr);
  EXPECT_TRUE(alike.layers.empty());
  EXPECT_EQ(alike.of_layer(1).topk, 7);
  EXPECT_EQ(alike.of_layer(1).window_size, 20);
  adapter.layers = {{8, 8}, {8, 8}, {8, 4000}};  // far keys stay beyond every window
  EXPECT_EQ(resolve({.scorer = "a.safetensors"}, &adapter, nullptr).far_distance, 4002);
  EXPECT_TRUE(resolve({.kind = AttentionKind::kWindow}, &adapter, nullptr).layers.empty());
}

TEST(AttentionConfig, ParsesItsOwnNames) {
  for (AttentionKind kind : {AttentionKind::kDense, AttentionKind::kWindow, AttentionKind::kSparsek}) {
    EXPECT_EQ(parse_attention_kind(name(kind)), kind);
  }
  EXPECT_EQ(parse_gate("soft"), Gate::kSoft);
  EXPECT_THAT(message_of<UsageError>([] { parse_attention_kind("sparse"); }), StartsWith("attention: "));
  EXPECT_THAT(message_of<UsageError>([] { parse_gate("on"); }), StartsWith("gate: "));
}

}  // namespace
}  // namespace sparsek::model
