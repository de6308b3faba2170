// Whole tiny models: any cut of a document gives the same result, adapters included; losses, state sizes, bad ids.
#include "model/transformer.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "base/error.h"
#include "model/adapter.h"
#include "model/checkpoint.h"
#include "model/state_size.h"
#include "model/weights.h"
#include "tests/model/tiny_model.h"

namespace sparsek::model {
namespace {

using test::message_of;
using test::TemporaryFolder;
using testing::AllOf;
using testing::HasSubstr;

std::vector<int32_t> random_ids(int64_t count) {
  std::mt19937_64 generator(test::kTinySeed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(generator() % 61);
  return ids;
}

at::Tensor as_tensor(std::vector<int32_t>& ids, int64_t first, int64_t count) {
  return at::from_blob(ids.data() + first, {count}, at::kInt);
}

// Logits [tokens, vocab] of a document read in pieces of the given sizes, the last one repeated.
std::vector<float> read(const Transformer& model, std::vector<int32_t>& ids, const std::vector<int64_t>& pieces) {
  DecodeState state = model.new_state();
  std::vector<float> all;
  size_t piece = 0;
  for (int64_t first = 0; first < static_cast<int64_t>(ids.size());) {
    const int64_t count =
        std::min(pieces[std::min(piece++, pieces.size() - 1)], static_cast<int64_t>(ids.size()) - first);
    const at::Tensor logits = model.logits(model.forward(as_tensor(ids, first, count), state));
    all.insert(all.end(), logits.const_data_ptr<float>(), logits.const_data_ptr<float>() + logits.numel());
    first += count;
  }
  EXPECT_EQ(state.length(), static_cast<int64_t>(ids.size()));
  return all;
}

double max_difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

double mean_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(double{a[i]} - double{b[i]});
  return a.size() == b.size() ? sum / static_cast<double>(a.size()) : INFINITY;
}

class TransformerTest : public testing::Test {
 protected:
  void SetUp() override {
    test::tiny_llama().write(folder_.path());
    config_ = read_model_config(folder_.path());
  }
  Transformer load(const AttentionRequest& attention, at::ScalarType dtype = at::kFloat, bool plain = false) const {
    return Transformer::load(
        {.path = folder_.path(), .attention = attention, .placement = {.dtype = dtype, .plain = plain}});
  }
  // A random adapter; hidden 0: linear. Returns its path.
  std::string adapter(double alpha, int64_t hidden, bool timestep_norm,
                      const std::vector<LayerBudget>& layers = {}) const {
    at::manual_seed(test::kTinySeed);
    Adapter adapter;
    adapter.base = "tiny";
    adapter.timestep_norm = timestep_norm;
    adapter.attention = {
        .topk = 8, .window_size = 12, .num_sinks = 2, .far_distance = 22, .layers = layers, .gate = Gate::kSoft};
    if (!layers.empty()) {
      adapter.attention.topk = mean_budget(layers).topk;
      adapter.attention.window_size = mean_budget(layers).window_size;
    }
    for (int64_t i = 0; i < config_.num_layers; ++i) {
      LayerScorer layer;
      if (hidden > 0) {
        layer.hidden_weight = at::randn({hidden, config_.dim});
        layer.hidden_bias = at::randn({hidden});
      }
      layer.weight = at::randn({config_.num_kv_heads, hidden > 0 ? hidden : config_.dim}).mul_(0.3);
      layer.alpha = alpha;
      layer.beta = at::randn({config_.num_kv_heads});
      layer.gamma = at::rand({config_.num_kv_heads}).add_(0.5);
      layer.slope = at::rand({config_.num_kv_heads});
      adapter.layers.push_back(layer);
    }
    const std::string path = folder_.file(fmt::format("adapter{}.safetensors", layers.size()));
    save_adapter(path, adapter, config_);
    return path;
  }

  TemporaryFolder folder_;
  ModelConfig config_;
};

TEST_F(TransformerTest, AnyCutGivesTheSameLogits) {
  std::vector<AttentionRequest> requests = {
      {.kind = AttentionKind::kDense},
      {.kind = AttentionKind::kWindow, .window_size = 12, .num_sinks = 3},
      {.kind = AttentionKind::kWindow, .window_size = 1, .num_sinks = 0},
      {.kind = AttentionKind::kWindow, .window_size = 5, .num_sinks = 9, .far_distance = 0},
      {.topk = 8, .window_size = 12, .num_sinks = 2},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .slope = 20},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .gate = Gate::kSoft, .scorer = "key_norm"},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .gate = Gate::kSoft, .scorer = "key_norm", .slope = 5},
  };
  std::vector<int32_t> ids = random_ids(90);
  for (const AttentionRequest& request : requests) {
    const Transformer model = load(request);
    const std::vector<float> whole = read(model, ids, {90});
    for (const std::vector<int64_t>& pieces : std::vector<std::vector<int64_t>>{{1}, {7}, {30}, {3, 1, 1, 40, 2, 1}}) {
      EXPECT_LE(max_difference(read(model, ids, pieces), whole), 2e-4)
          << describe(model.attention()) << " pieces " << testing::PrintToString(pieces);
    }
  }
}

TEST_F(TransformerTest, AdaptersGiveTheSameLogitsInAnyCut) {
  std::vector<int32_t> ids = random_ids(90);
  std::vector<float> previous;
  for (const double alpha : {0.0, 0.7}) {
    for (const int64_t hidden : {0, 6}) {
      for (const bool timestep_norm : {false, true}) {
        const Transformer model = load({.scorer = adapter(alpha, hidden, timestep_norm)});
        EXPECT_EQ(model.attention().topk, 8);
        EXPECT_EQ(model.attention().gate, Gate::kSoft);
        const std::vector<float> whole = read(model, ids, {90});
        for (const std::vector<int64_t>& pieces :
             std::vector<std::vector<int64_t>>{{1}, {7}, {30}, {3, 1, 1, 40, 2, 1}}) {
          EXPECT_LE(max_difference(read(model, ids, pieces), whole), 2e-4)
              << "alpha " << alpha << " hidden " << hidden << " norm " << timestep_norm << " pieces "
              << testing::PrintToString(pieces);
        }
        EXPECT_GT(max_difference(whole, previous), 1e-3) << "every variant computes something else";
        previous = whole;
      }
    }
  }
}

TEST_F(TransformerTest, LayersHaveTheirOwnBudgets) {
  std::vector<int32_t> ids = random_ids(90);
  for (const double alpha : {0.0, 0.7}) {
    const std::vector<float> alike = read(load({.scorer = adapter(alpha, 6, true)}), ids, {90});
    EXPECT_EQ(read(load({.scorer = adapter(alpha, 6, true, {{8, 12}, {8, 12}})}), ids, {90}), alike);
    std::vector<std::vector<float>> variants = {alike};
    for (const std::vector<LayerBudget>& layers : {std::vector<LayerBudget>{{3, 17}, {40, 5}}, {{40, 5}, {3, 17}}}) {
      const std::string path = adapter(alpha, 6, true, layers);
      EXPECT_EQ(load_adapter(path, config_).attention.layers, layers);
      for (const bool plain : {false, true}) {
        const Transformer model = load({.scorer = path}, at::kFloat, plain);
        const std::vector<float> whole = read(model, ids, {90});
        for (const std::vector<int64_t>& pieces :
             std::vector<std::vector<int64_t>>{{1}, {7}, {30}, {3, 1, 1, 40, 2, 1}}) {
          EXPECT_LE(max_difference(read(model, ids, pieces), whole), 2e-4)
              << "alpha " << alpha << " pieces " << testing::PrintToString(pieces);
        }
        if (plain) continue;
        for (const std::vector<float>& other : variants) EXPECT_GT(max_difference(whole, other), 1e-3);
        variants.push_back(whole);
      }
    }
    // Asked for, one budget is every layer's.
    const AttentionRequest request{.topk = 8, .window_size = 12, .scorer = adapter(alpha, 6, true, {{3, 17}, {40, 5}})};
    EXPECT_EQ(read(load(request), ids, {90}), alike);
  }
  // Where one layer sees everything, that layer is dense: both do, and there is no far distance.
  AttentionRequest all{.far_distance = 0, .scorer = adapter(0, 6, true, {{90, 2}, {1, 90}})};
  all.num_sinks = 0;
  EXPECT_LE(max_difference(read(load(all), ids, {90}), read(load({.kind = AttentionKind::kDense}), ids, {90})), 2e-4);
}

// window_mass with a slope is the adapter whose scorer gives 0 and whose alpha is 1.
TEST_F(TransformerTest, UntrainedSlopeIsTheOneOfEquation1) {
  std::vector<int32_t> ids = random_ids(90);
  std::vector<float> previous;
  for (const double slope : {0.0, 20.0}) {
    Adapter same = load_adapter(adapter(/*alpha=*/1, /*hidden=*/0, /*timestep_norm=*/false), config_);
    for (LayerScorer& layer : same.layers) {
      layer.weight.zero_();
      layer.beta.zero_();
      layer.gamma.fill_(1);
      layer.slope.fill_(slope);
    }
    save_adapter(folder_.file("same.safetensors"), same, config_);
    AttentionRequest request{.topk = 8, .window_size = 12, .num_sinks = 2, .gate = Gate::kSoft, .slope = slope};
    for (const std::vector<int64_t>& pieces : std::vector<std::vector<int64_t>>{{90}, {3, 1, 1, 40, 2, 1}}) {
      const std::vector<float> untrained = read(load(request), ids, pieces);
      EXPECT_EQ(untrained, read(load({.scorer = folder_.file("same.safetensors")}), ids, pieces)) << slope;
      if (pieces.size() == 1) {
        EXPECT_GT(max_difference(untrained, previous), 1e-3) << "the slope changes what is kept";
        previous = untrained;
      }
    }
  }
}

TEST_F(TransformerTest, EverythingVisibleIsDense) {
  std::vector<int32_t> ids = random_ids(60);
  const std::vector<float> dense = read(load({.kind = AttentionKind::kDense}), ids, {60});
  const AttentionRequest wide{.kind = AttentionKind::kWindow, .window_size = 60};
  const AttentionRequest many{.topk = 60, .window_size = 4, .num_sinks = 1, .far_distance = 0};
  EXPECT_LE(max_difference(read(load(wide), ids, {17}), dense), 1e-4);
  EXPECT_LE(max_difference(read(load(many), ids, {17}), dense), 1e-4);
}

// What another device computes, on the CPU: torch's own operations, plain weights, and single tokens as a step that is
// repeated on the same tensors and may know no position but the one in them.
TEST_F(TransformerTest, PlainOperationsGiveTheSameLogits) {
  const std::vector<AttentionRequest> requests = {
      {.kind = AttentionKind::kDense},
      {.kind = AttentionKind::kWindow, .window_size = 12, .num_sinks = 3},
      {.kind = AttentionKind::kWindow, .window_size = 5, .num_sinks = 9, .far_distance = 0},
      {.topk = 8, .window_size = 12, .num_sinks = 2},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .far_distance = 0},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .gate = Gate::kSoft, .scorer = "key_norm", .slope = 5},
      {.scorer = adapter(/*alpha=*/0.7, /*hidden=*/6, /*timestep_norm=*/true)},
  };
  std::vector<int32_t> ids = random_ids(90);
  for (const AttentionRequest& request : requests) {
    const std::vector<float> packed = read(load(request), ids, {90});
    const Transformer plain = load(request, at::kFloat, /*plain=*/true);
    for (const std::vector<int64_t>& pieces : std::vector<std::vector<int64_t>>{{90}, {7}, {1}, {3, 1, 1, 40, 2, 1}}) {
      EXPECT_LE(max_difference(read(plain, ids, pieces), packed), 2e-4)
          << describe(plain.attention()) << " pieces " << testing::PrintToString(pieces);
    }
    if (request.scorer.ends_with("safetensors")) continue;  // random scorers choose other keys after rounding
    const double rounding = mean_difference(read(load(request, at::kBFloat16), ids, {90}), packed);
    const Transformer bf16 = load(request, at::kBFloat16, /*plain=*/true);
    EXPECT_LE(mean_difference(read(bf16, ids, {90}), packed), 2 * rounding) << describe(plain.attention());
    EXPECT_GT(rounding, 1e-4);
  }
}

// Steps of two states of one model take turns, and one of them starts over with a chunk.
TEST_F(TransformerTest, RepeatedStepsBelongToTheirState) {
  const Transformer model = load({.topk = 8, .window_size = 12, .num_sinks = 2}, at::kFloat, /*plain=*/true);
  std::vector<int32_t> ids = random_ids(60);
  const std::vector<float> whole = read(model, ids, {60});
  DecodeState states[2] = {model.new_state(), model.new_state()};
  std::vector<float> interleaved[2];
  const auto step = [&](int which, int64_t first, int64_t count) {
    const at::Tensor logits = model.logits(model.forward(as_tensor(ids, first, count), states[which]));
    interleaved[which].insert(interleaved[which].end(), logits.const_data_ptr<float>(),
                              logits.const_data_ptr<float>() + logits.numel());
  };
  for (int64_t t = 0; t < 20; ++t) {
    step(0, t, 1);
    step(1, t, 1);
  }
  step(1, 20, 15);
  for (int64_t t = 20; t < 60; ++t) {
    step(0, t, 1);
    if (t >= 35) step(1, t, 1);
  }
  EXPECT_LE(max_difference(interleaved[0], whole), 2e-4);
  EXPECT_LE(max_difference(interleaved[1], whole), 2e-4);
}

// What is read into a copy, in chunks and in single tokens, is not seen by what it was copied from.
TEST_F(TransformerTest, CopiesOfAStateGoTheirOwnWay) {
  const std::vector<AttentionRequest> requests = {
      {.kind = AttentionKind::kDense},
      {.kind = AttentionKind::kWindow, .window_size = 12, .num_sinks = 3},
      {.topk = 8, .window_size = 12, .num_sinks = 2},
  };
  std::vector<int32_t> ids = random_ids(90);
  std::vector<int32_t> others(ids.rbegin(), ids.rend());
  for (const AttentionRequest& request : requests) {
    for (const bool plain : {false, true}) {
      const Transformer model = load(request, at::kFloat, plain);
      const std::vector<float> whole = read(model, ids, {50, 1, 1, 1, 37});
      DecodeState state = model.new_state();
      std::vector<float> logits;
      const auto go_on = [&](int64_t first, int64_t count) {
        const at::Tensor more = model.logits(model.forward(as_tensor(ids, first, count), state));
        logits.insert(logits.end(), more.const_data_ptr<float>(), more.const_data_ptr<float>() + more.numel());
      };
      go_on(0, 50);
      go_on(50, 1);
      DecodeState copy = state.copy();
      EXPECT_EQ(copy.length(), 51);
      EXPECT_EQ(copy.size_in_bytes(), state.size_in_bytes());
      for (int64_t t = 0; t < 5; ++t) model.forward(as_tensor(others, t, 1), copy);
      model.forward(as_tensor(others, 5, 30), copy);
      go_on(51, 1);
      go_on(52, 1);
      go_on(53, 37);
      EXPECT_EQ(logits, whole) << describe(model.attention()) << (plain ? " plain" : "");
    }
  }
}

// Documents read one by one, then decoded side by side: the logits are those of each alone, whose state stays as it
// was.
TEST_F(TransformerTest, DocumentsSideBySideAreThoseOfEachAlone) {
  const std::vector<AttentionRequest> requests = {
      {.topk = 8, .window_size = 12, .num_sinks = 2},
      {.topk = 8, .window_size = 12, .num_sinks = 2, .gate = Gate::kSoft, .far_distance = 0, .scorer = "key_norm"},
      {.scorer = adapter(/*alpha=*/0.7, /*hidden=*/6, /*timestep_norm=*/true)},
      {.scorer = adapter(/*alpha=*/0.7, /*hidden=*/6, /*timestep_norm=*/true, {{3, 13}, {20, 7}})},
  };
  constexpr int64_t kSteps = 25;
  for (const AttentionRequest& request : requests) {
    for (const bool plain : {false, true}) {
      for (const std::vector<int64_t>& lengths : std::vector<std::vector<int64_t>>{{5, 5, 5}, {13, 36, 30}}) {
        const Transformer model = load(request, at::kFloat, plain);
        const std::string what =
            describe(model.attention()) + (plain ? " plain " : " ") + testing::PrintToString(lengths);
        // No token twice in a document: the norms of its first keys would differ by rounding alone, and that would
        // select.
        std::vector<int32_t> ids(300);
        for (int d = 0; d < 3; ++d) {
          std::iota(ids.begin() + d * 100, ids.begin() + d * 100 + 61, 0);
          std::shuffle(ids.begin() + d * 100, ids.begin() + d * 100 + 61, std::mt19937(d));
        }
        std::vector<DecodeState> states;
        std::vector<const DecodeState*> alone;
        for (size_t d = 0; d < lengths.size(); ++d) {
          states.push_back(model.new_state());
          model.forward(as_tensor(ids, static_cast<int64_t>(d) * 100, lengths[d]), states[d]);
        }
        for (const DecodeState& state : states) alone.push_back(&state);
        DecodeState together = model.join(alone);
        ASSERT_EQ(together.documents(), 3);
        EXPECT_EQ(together.size_in_bytes(), 3 * states[0].size_in_bytes());
        std::vector<std::vector<float>> joined(lengths.size()), expected(lengths.size());
        for (int64_t t = 0; t < kSteps; ++t) {
          std::vector<int32_t> next;
          for (size_t d = 0; d < lengths.size(); ++d) next.push_back(ids[d * 100 + lengths[d] + t]);
          const at::Tensor hidden = model.forward(as_tensor(next, 0, 3), together);
          const at::Tensor logits = model.logits(hidden), likely = model.most_likely(hidden);
          for (int64_t d = 0; d < 3; ++d) {
            const float* row = logits.const_data_ptr<float>() + d * 61;
            joined[d].insert(joined[d].end(), row, row + 61);
            EXPECT_EQ(likely.const_data_ptr<int32_t>()[d], std::max_element(row, row + 61) - row);
          }
        }
        EXPECT_EQ(together.length(), *std::min_element(lengths.begin(), lengths.end()) + kSteps);
        for (size_t d = 0; d < lengths.size(); ++d) {
          for (int64_t t = 0; t < kSteps; ++t) {
            const int64_t at = static_cast<int64_t>(d) * 100 + lengths[d] + t;
            const at::Tensor logits = model.logits(model.forward(as_tensor(ids, at, 1), states[d]));
            const float* row = logits.const_data_ptr<float>();
            expected[d].insert(expected[d].end(), row, row + 61);
          }
          EXPECT_LE(max_difference(joined[d], expected[d]), 2e-4) << what << " document " << d;
        }
        EXPECT_GT(max_difference(joined[0], joined[1]), 0.1);
      }
    }
  }
}

TEST_F(TransformerTest, DocumentsThatCannotBeSideBySideAreRefused) {
  std::vector<int32_t> ids = random_ids(40);
  const Transformer dense = load({.kind = AttentionKind::kDense});
  const DecodeState cache = dense.new_state();
  EXPECT_THAT(message_of<UsageError>([&] { dense.join({&cache, &cache}); }),
              AllOf(HasSubstr("sparsek"), HasSubstr("dense")));

  const Transformer model = load({.topk = 8, .window_size = 12, .num_sinks = 2});
  DecodeState first = model.new_state(), longer = model.new_state();
  model.forward(as_tensor(ids, 0, 5), first);
  model.forward(as_tensor(ids, 0, 30), longer);
  const auto message = [](const std::function<void()>& action) { return message_of<c10::Error>(action); };
  EXPECT_THAT(message([&] { model.join({&first, &longer}); }), AllOf(HasSubstr("12"), HasSubstr("5 and 30 tokens")));
  DecodeState unfilled = model.new_state();
  model.forward(as_tensor(ids, 0, 10), unfilled);
  EXPECT_THAT(message([&] { model.join({&first, &unfilled}); }), HasSubstr("5 and 10 tokens"));
  EXPECT_THAT(message([&] { model.join({}); }), HasSubstr("none"));
  DecodeState both = model.join({&first, &first});
  EXPECT_THAT(message([&] { model.forward(as_tensor(ids, 0, 3), both); }),
              AllOf(HasSubstr("2 documents"), HasSubstr("3 tokens")));
}

TEST(RandomWeights, MakeAModelOfAConfigAlone) {
  const TemporaryFolder folder;
  test::tiny_llama().write(folder.path());
  std::filesystem::remove(folder.file("model.safetensors"));
  std::vector<int32_t> ids = random_ids(40);
  for (const bool plain : {false, true}) {
    const Transformer model = Transformer::load(
        {.path = folder.file("config.json"), .random_weights = true, .attention = {}, .placement = {.plain = plain}});
    EXPECT_EQ(model.weight_bytes(),
              planned_weight_bytes(Checkpoint::random(folder.file("config.json")), {.plain = plain}));
    const std::vector<float> logits = read(model, ids, {40});
    const auto [least, most] = std::minmax_element(logits.begin(), logits.end());
    EXPECT_GT(*most - *least, 0.1);
    EXPECT_TRUE(std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }));
  }
  const Checkpoint checkpoint = Checkpoint::random(folder.file("config.json"));
  const at::Tensor down = load_weights(checkpoint, {.plain = true}).layers[1].down.plain;
  const WeightView wanted = checkpoint.weight(WeightId::kDown, 1);
  ASSERT_EQ(down.nbytes(), wanted.bytes.size());
  EXPECT_EQ(std::memcmp(down.const_data_ptr(), wanted.bytes.data(), down.nbytes()), 0);
  EXPECT_THAT(message_of<DataError>([&] { Checkpoint::random(folder.file("none.json")); }), HasSubstr("none.json"));
}

TEST_F(TransformerTest, PlainWeightsTakeTheBytesThatWerePlanned) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Transformer model = load({}, dtype, /*plain=*/true);
    EXPECT_EQ(model.weight_bytes(), planned_weight_bytes(Checkpoint(folder_.path()), {.dtype = dtype, .plain = true}));
  }
  EXPECT_EQ(load({}, at::kFloat, true).weight_bytes(), 4 * config_.num_parameters());
}

TEST_F(TransformerTest, LossesAreThoseOfTheLogits) {
  for (const bool plain : {false, true}) {
    const Transformer model = load({}, at::kFloat, plain);
    std::vector<int32_t> ids = random_ids(150);  // more than one block of rows
    DecodeState state = model.new_state();
    const at::Tensor hidden = model.forward(as_tensor(ids, 0, 149), state);
    const std::vector<double> losses = model.losses(hidden, as_tensor(ids, 1, 149));
    const at::Tensor logits = model.logits(hidden);
    ASSERT_EQ(losses.size(), 149u);
    for (int64_t t = 0; t < 149; ++t) {
      const float* row = logits.const_data_ptr<float>() + t * 61;
      double sum = 0;
      for (int v = 0; v < 61; ++v) sum += std::exp(double{row[v]});
      EXPECT_NEAR(losses[t], std::log(sum) - row[ids[t + 1]], 2e-4) << t;
    }
  }
}

TEST_F(TransformerTest, StateBytesFollowTheFormulaAndDoNotGrow) {
  std::vector<int32_t> ids = random_ids(80);
  for (const int64_t far : {0, 30}) {
    const Transformer model = load({.topk = 8, .window_size = 12, .num_sinks = 2, .far_distance = far}, at::kBFloat16);
    DecodeState state = model.new_state();
    const int64_t before = state.size_in_bytes();
    model.forward(as_tensor(ids, 0, 80), state);
    EXPECT_EQ(state.size_in_bytes(), before);
    EXPECT_EQ(state_size_in_bytes(config_, model.attention(), at::kBFloat16, 1'000'000), before);
    // math.md section 6 per layer: keys and values, 12 bytes a slot, 4 a pool score; and what delayed scores and
    // statistics add: 8 bytes a ring row and 24 a head, 8 for the length.
    const int64_t heads = 2, pool = 1024;
    const int64_t wanted =
        heads * (8 * 2 * (2 * (2 + 12 + 8) + (far > 0 ? 12 : 0)) + 12 * 8 + 4 * pool + 8 * 12 + 24) + 8;
    EXPECT_EQ(before, 2 * wanted);
  }
  const AttentionConfig dense{.kind = AttentionKind::kDense};
  EXPECT_EQ(state_size_in_bytes(config_, dense, at::kBFloat16, 1000), 2 * 1000 * 2 * 2 * 8 * 2);
}

TEST(StateSize, FormulaIsWhatIsAllocated) {
  for (const auto& [topk, window, sinks] : {std::tuple{8, 12, 2}, {1, 1, 0}, {300, 7, 5}}) {
    for (const std::optional<int64_t> pool : {std::optional<int64_t>(), {0}, {topk + 1}}) {
      for (const int option : {0, 1, 2, 3}) {
        for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
          const ops::AttentionStateOptions options{.batch = 2,
                                                   .num_kv_heads = 3,
                                                   .head_dim = 24,
                                                   .topk = topk,
                                                   .window_size = window,
                                                   .num_sinks = sinks,
                                                   .pool_size = pool,
                                                   .far_rotary = (option & 1) != 0,
                                                   .delayed_scores = (option & 2) != 0,
                                                   .dtype = dtype};
          EXPECT_EQ(state_size_in_bytes(options), ops::size_in_bytes(ops::new_attention_state(options)))
              << "topk " << topk << " pool " << pool.value_or(-1) << " option " << option << " " << dtype;
        }
      }
    }
  }
}

TEST_F(TransformerTest, StateBytesOfEveryKindAreThoseOfTheState) {
  std::vector<int32_t> ids = random_ids(30);
  for (const AttentionRequest& request :
       std::vector<AttentionRequest>{{.kind = AttentionKind::kWindow, .window_size = 12, .num_sinks = 3},
                                     {.topk = 8, .window_size = 12},
                                     {.topk = 8, .window_size = 12, .far_distance = 0, .scorer = "key_norm"},
                                     {.scorer = adapter(/*alpha=*/0, /*hidden=*/0, /*timestep_norm=*/true)}}) {
    const Transformer model = load(request);
    DecodeState state = model.new_state();
    model.forward(as_tensor(ids, 0, 30), state);
    EXPECT_EQ(state_size_in_bytes(config_, model.attention(), at::kFloat, 30), state.size_in_bytes())
        << describe(model.attention());
  }
  const Transformer delayed = load({.scorer = adapter(/*alpha=*/0.5, /*hidden=*/0, /*timestep_norm=*/true)});
  EXPECT_EQ(state_size_in_bytes(config_, delayed.attention(), at::kFloat, 30), delayed.new_state().size_in_bytes());
  const Transformer layered = load({.scorer = adapter(/*alpha=*/0.5, 0, /*timestep_norm=*/true, {{3, 17}, {40, 5}})});
  EXPECT_EQ(state_size_in_bytes(config_, layered.attention(), at::kFloat, 30), layered.new_state().size_in_bytes());
  int64_t sum = 0;  // a state of two layers of one budget is twice a layer's
  for (const LayerBudget& budget : layered.attention().layers) {
    AttentionConfig alike = layered.attention();
    alike.layers = {budget, budget};
    sum += state_size_in_bytes(config_, alike, at::kFloat, 30);
  }
  EXPECT_EQ(sum, 2 * layered.new_state().size_in_bytes());
}

TEST_F(TransformerTest, RefusesIdsOutsideTheVocabulary) {
  for (const bool plain : {false, true}) {
    const Transformer model = load({}, at::kFloat, plain);
    DecodeState state = model.new_state();
    for (const int32_t bad : {-1, 61}) {
      std::vector<int32_t> ids = {0, bad};
      EXPECT_THROW(model.forward(as_tensor(ids, 0, 2), state), c10::Error);
      EXPECT_THROW(model.forward(as_tensor(ids, 1, 1), state), c10::Error);
    }
  }
}

TEST_F(TransformerTest, RefusesAdaptersOfOtherModelsAndDamagedOnes) {
  const std::string path = adapter(0, 0, true);
  const auto refusal = [&](const std::function<void(ModelConfig&)>& change) {
    ModelConfig other = config_;
    change(other);
    return message_of<DataError>([&] { load_adapter(path, other); });
  };
  EXPECT_NO_THROW(load_adapter(path, config_));
  EXPECT_THAT(refusal([](ModelConfig& c) { c.num_layers = 3; }), AllOf(HasSubstr(path), HasSubstr("num_layers")));
  EXPECT_THAT(refusal([](ModelConfig& c) { c.dim = 64; }), HasSubstr("another model"));
  EXPECT_THAT(refusal([](ModelConfig& c) { c.architecture = Architecture::kQwen3; }), HasSubstr("qwen3"));

  const Adapter good = load_adapter(path, config_);
  const auto saved_refusal = [&](const std::function<void(Adapter&)>& damage) {
    Adapter adapter = load_adapter(path, config_);
    damage(adapter);
    save_adapter(folder_.file("bad.safetensors"), adapter, config_);
    return message_of<DataError>([&] { load_adapter(folder_.file("bad.safetensors"), config_); });
  };
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.layers[1].weight = at::randn({2, 31}); }), HasSubstr("scorer.weight"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.layers[1].beta.fill_(NAN); }), HasSubstr("layers.1.beta"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.layers[0].slope.fill_(-1); }), HasSubstr("slope"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.attention.topk = 0; }), HasSubstr("topk"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.layers.pop_back(); }), HasSubstr("layers.1"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.attention.layers = {{8, 12}}; }), HasSubstr("of 2 layers, found 1"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.attention.layers = {{8, 12}, {10, 12}}; }),
              HasSubstr("the layers' means 9 and 12, found 8 and 12"));
  EXPECT_THAT(saved_refusal([](Adapter& a) { a.attention.layers = {{8, 12}, {0, 3}}; }),
              AllOf(HasSubstr("bad.safetensors"), HasSubstr("0+3")));
  EXPECT_THAT(message_of<DataError>([&] { load_adapter(folder_.file("model.safetensors"), config_); }),
              HasSubstr("format"));
}

}  // namespace
}  // namespace sparsek::model
