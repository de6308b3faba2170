// The trainable network computes what inference computes: same losses for every attention kind, packed documents as if
// alone, and the same gradients with and without recomputation.
#include "train/network.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "model/adapter.h"
#include "model/transformer.h"
#include "tests/model/tiny_model.h"
#include "tests/train/tiny.h"
#include "train/token_loss.h"

namespace sparsek::train {
namespace {

using model::AttentionKind;
using test::TinyOptions;

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  const double worst = (a - b).abs().max().item<double>();
  return worst == worst ? worst : 1e300;
}

struct InferenceCase {
  const char* name;
  AttentionKind kind;
  int64_t far_distance;
  double alpha;
  int64_t hidden;
  bool timestep_norm;
  std::vector<model::LayerBudget> layers = {};
};

class AgainstInference : public testing::TestWithParam<InferenceCase> {};

TEST_P(AgainstInference, SameLosses) {
  const InferenceCase& c = GetParam();
  const sparsek::test::TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const model::ModelConfig config = model::read_model_config(folder.path());
  Parameters parameters = base_parameters(folder.path());

  AttentionSettings settings;
  settings.attention.kind = c.kind;
  model::AttentionRequest request{.kind = c.kind};
  if (c.kind != AttentionKind::kDense) {
    settings.attention.window_size = *(request.window_size = 12);
    settings.attention.num_sinks = *(request.num_sinks = 2);
    settings.attention.far_distance = *(request.far_distance = c.far_distance);
  }
  if (c.kind == AttentionKind::kSparsek) {
    settings.attention.topk = *(request.topk = 8);
    settings.attention.layers = c.layers;
    if (!c.layers.empty()) request.topk = request.window_size = std::nullopt;  // the adapter's
    settings.attention.gate = *(request.gate = Gate::kSoft);
    settings.attention.delayed_scores = c.alpha != 0;
    settings.timestep_norm = c.timestep_norm;
    ScorerOptions scorer;
    scorer.hidden = c.hidden;
    scorer.alpha = c.alpha;
    scorer.slope = 3;
    scorer.delayed = c.alpha != 0;
    add_scorers(parameters, config, scorer, 3);
    model::Adapter adapter;
    adapter.timestep_norm = c.timestep_norm;
    adapter.attention = {.topk = 8,
                         .window_size = 12,
                         .num_sinks = 2,
                         .far_distance = c.far_distance,
                         .layers = c.layers,
                         .gate = Gate::kSoft};
    if (!c.layers.empty()) {
      adapter.attention.topk = mean_budget(c.layers).topk;
      adapter.attention.window_size = mean_budget(c.layers).window_size;
    }
    for (const LayerParameters& layer : parameters.layers) {
      adapter.layers.push_back(
          {layer.scorer_hidden, layer.scorer_hidden_bias, layer.scorer, c.alpha, layer.beta, layer.gamma, layer.slope});
    }
    request.scorer = folder.file("adapter.safetensors");
    model::save_adapter(request.scorer, adapter, config);
  }
  const Network network(config, std::move(parameters), settings, {.dtype = at::kFloat});
  const model::Transformer inference =
      model::Transformer::load({.path = folder.path(), .attention = request, .placement = {.dtype = at::kFloat}});

  std::mt19937_64 generator(7);
  std::vector<int32_t> ids(90);
  for (int32_t& id : ids) id = static_cast<int32_t>(generator() % 61);
  const at::Tensor all = at::from_blob(ids.data(), {90}, at::kInt);
  model::DecodeState state = inference.new_state();
  const std::vector<double> wanted =
      inference.losses(inference.forward(all.narrow(0, 0, 89), state), all.narrow(0, 1, 89));

  const at::NoGradGuard no_grad;
  const at::Tensor input = all.narrow(0, 0, 89).to(at::kLong).unsqueeze(0);
  const at::Tensor hidden = network.forward(input, network.layout(1, 89), nullptr);
  const at::Tensor losses =
      token_scores(hidden[0], network.parameters().output_matrix(), all.narrow(0, 1, 89).to(at::kLong), /*rows=*/32)
          .losses;
  for (int64_t t = 0; t < 89; ++t) {
    ASSERT_NEAR(losses[t].item<double>(), wanted[t], 1e-4) << "token " << t;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, AgainstInference,
    testing::Values(InferenceCase{"dense", AttentionKind::kDense, 0, 0, 0, true},
                    InferenceCase{"window", AttentionKind::kWindow, 0, 0, 0, true},
                    InferenceCase{"window_far", AttentionKind::kWindow, 14, 0, 0, true},
                    InferenceCase{"linear", AttentionKind::kSparsek, 0, 0, 0, true},
                    InferenceCase{"mlp_far", AttentionKind::kSparsek, 22, 0, 6, true},
                    InferenceCase{"mlp_delayed_far", AttentionKind::kSparsek, 22, 0.7, 6, true},
                    InferenceCase{"linear_delayed_plain", AttentionKind::kSparsek, 0, 0.7, 0, false},
                    InferenceCase{"layers", AttentionKind::kSparsek, 22, 0, 6, true, {{3, 17}, {20, 5}}},
                    InferenceCase{"layers_delayed", AttentionKind::kSparsek, 22, 0.7, 6, true, {{3, 17}, {20, 5}}}),
    [](const auto& info) { return info.param.name; });

TEST(Scorers, OfAnAdapterGetNoLargerSlopes) {
  const sparsek::test::TemporaryFolder folder;
  sparsek::test::tiny_llama().write(folder.path());
  const model::ModelConfig config = model::read_model_config(folder.path());
  Parameters parameters = base_parameters(folder.path());
  ScorerOptions options;
  options.slope = 3;
  options.delayed = false;
  add_scorers(parameters, config, options, 3);
  model::Adapter adapter;
  adapter.attention = {.topk = 8, .window_size = 12, .num_sinks = 2, .far_distance = 0, .gate = Gate::kSoft};
  for (const LayerParameters& layer : parameters.layers) {
    adapter.layers.push_back(
        {layer.scorer_hidden, layer.scorer_hidden_bias, layer.scorer, 0, layer.beta, layer.gamma, layer.slope});
  }
  options.adapter = folder.file("adapter.safetensors");
  model::save_adapter(options.adapter, adapter, config);
  for (const double largest : {-1.0, 0.25}) {
    options.largest_slope = largest;
    Parameters again = base_parameters(folder.path());
    add_scorers(again, config, options, 3);
    for (size_t i = 0; i < again.layers.size(); ++i) {
      EXPECT_TRUE(again.layers[i].scorer.equal(parameters.layers[i].scorer));
      EXPECT_EQ(again.layers[i].slope.min().item<double>(), largest < 0 ? 3 : largest);
      EXPECT_EQ(again.layers[i].slope.max().item<double>(), largest < 0 ? 3 : largest);
    }
  }
}

class EveryKind : public testing::TestWithParam<AttentionKind> {};

TEST_P(EveryKind, PackedDocumentsAreAlone) {
  const Network network = test::tiny_network({.kind = GetParam(), .far_distance = 9});
  const at::NoGradGuard no_grad;
  const at::Tensor ids = test::tiny_ids(1, 60);
  const at::Tensor packed = network.forward(ids, network.layout(1, 60, {25, 26, 60}), nullptr);
  Tensors alone;
  for (const auto& [first, count] : {std::pair{0, 25}, {25, 1}, {26, 34}}) {
    alone.push_back(network.forward(ids.narrow(1, first, count), network.layout(1, count), nullptr));
  }
  EXPECT_LT(max_difference(packed, at::cat(alone, 1)), 1e-12);
}

TEST_P(EveryKind, RecomputationChangesNoGradient) {
  std::vector<Tensors> gradients;
  for (const bool recompute : {false, true}) {
    Network network = test::tiny_network({.kind = GetParam(), .far_distance = 9, .recompute = recompute});
    const at::Tensor hidden = network.forward(test::tiny_ids(2, 40), network.layout(2, 40), nullptr);
    hidden.pow(2).sum().backward();
    gradients.emplace_back();
    visit_parameters(network.parameters(), [&](const std::string& name, at::Tensor& tensor, Group) {
      ASSERT_TRUE(tensor.grad().defined()) << name;
      gradients.back().push_back(tensor.grad());
    });
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_EQ(max_difference(gradients[0][i], gradients[1][i]), 0) << "tensor " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, EveryKind,
                         testing::Values(AttentionKind::kDense, AttentionKind::kWindow, AttentionKind::kSparsek),
                         [](const auto& info) { return model::name(info.param); });

}  // namespace
}  // namespace sparsek::train
