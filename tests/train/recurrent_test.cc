// Chunks behind a carried state (eq. 12, 13): the forward pass of the whole row; with all chunks' graphs kept, its
// gradients; rows at different positions; and, detached, no gradient from before.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "tests/train/tiny.h"

namespace sparsek::train {
namespace {

using model::AttentionKind;
using test::TinyOptions;

double max_difference(const at::Tensor& a, const at::Tensor& b) {
  const double worst = (a - b).abs().max().item<double>();
  return worst == worst ? worst : 1e300;
}

at::Tensor chunked(const Network& network, const at::Tensor& ids, const std::vector<int64_t>& sizes) {
  std::vector<LayerState> states = network.new_states(ids.size(0));
  Tensors parts;
  int64_t position = 0;
  for (const int64_t size : sizes) {
    const std::vector<int64_t> positions(ids.size(0), position);
    parts.push_back(
        network.forward(ids.narrow(1, position, size), network.layout(ids.size(0), size, {}, positions), &states));
    position += size;
  }
  return at::cat(parts, 1);
}

struct Case {
  const char* name;
  TinyOptions options;
};

class Recurrent : public testing::TestWithParam<Case> {};

TEST_P(Recurrent, EqualsWholeRows) {
  const at::Tensor ids = test::tiny_ids(2, 60);
  for (const bool recompute : {false, true}) {
    std::vector<Tensors> gradients;
    std::vector<at::Tensor> outputs;
    for (const bool in_chunks : {false, true}) {
      TinyOptions options = GetParam().options;
      options.recompute = recompute;
      Network network = test::tiny_network(options);
      const at::Tensor hidden =
          in_chunks ? chunked(network, ids, {3, 20, 1, 16, 20}) : network.forward(ids, network.layout(2, 60), nullptr);
      outputs.push_back(hidden.detach());
      (hidden.pow(2) * hidden.roll(1, -1).detach()).sum().backward();
      gradients.emplace_back();
      visit_parameters(network.parameters(), [&](const std::string& name, at::Tensor& tensor, Group) {
        ASSERT_TRUE(tensor.grad().defined()) << name;
        gradients.back().push_back(tensor.grad());
      });
    }
    EXPECT_LT(max_difference(outputs[0], outputs[1]), 1e-11);
    for (size_t i = 0; i < gradients[0].size(); ++i) {
      const double size = gradients[0][i].abs().max().item<double>();
      EXPECT_LT(max_difference(gradients[0][i], gradients[1][i]), 1e-10 * (1 + size)) << "tensor " << i;
    }
  }
}

// Two rows, one of which begins a new document while the other goes on.
TEST_P(Recurrent, RowsResetAlone) {
  const Network network = test::tiny_network(GetParam().options);
  const at::NoGradGuard no_grad;
  const at::Tensor ids = test::tiny_ids(2, 48);
  std::vector<LayerState> states = network.new_states(2);
  const std::vector<LayerState> fresh = network.new_states(2);
  network.forward(ids.narrow(1, 0, 16), network.layout(2, 16, {}, {0, 0}), &states);
  for (size_t i = 0; i < states.size(); ++i) {
    states[i] = reset_rows(states[i], fresh[i], at::tensor(std::vector<int64_t>{0, 1}).to(at::kBool));
  }
  Tensors parts;
  for (int64_t chunk = 0; chunk < 2; ++chunk) {
    parts.push_back(network.forward(ids.narrow(1, 16 + 16 * chunk, 16),
                                    network.layout(2, 16, {}, {16 + 16 * chunk, 16 * chunk}), &states));
  }
  const at::Tensor both = at::cat(parts, 1);
  const at::Tensor going_on = network.forward(ids.narrow(0, 0, 1), network.layout(1, 48), nullptr);
  const at::Tensor anew = network.forward(ids.narrow(0, 1, 1).narrow(1, 16, 32), network.layout(1, 32), nullptr);
  EXPECT_LT(max_difference(both.narrow(0, 0, 1), going_on.narrow(1, 16, 32)), 1e-11);
  EXPECT_LT(max_difference(both.narrow(0, 1, 1), anew), 1e-11);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Recurrent,
                         testing::Values(Case{"sparsek", {.delayed = false}}, Case{"sparsek_delayed", {}},
                                         Case{"sparsek_delayed_far", {.far_distance = 9, .pool_size = 12}},
                                         Case{"sparsek_plain_hard", {.gate = Gate::kHard, .timestep_norm = false}},
                                         Case{"sparsek_layers", {.far_distance = 9, .layers = {{3, 11}, {8, 5}}}},
                                         Case{"window", {.kind = AttentionKind::kWindow}},
                                         Case{"window_far", {.kind = AttentionKind::kWindow, .far_distance = 9}},
                                         Case{"dense", {.kind = AttentionKind::kDense}}),
                         [](const auto& info) { return info.param.name; });

TEST(RecurrentState, TensorsAndBack) {
  const Network network = test::tiny_network({.far_distance = 9});
  const LayerState state = network.new_states(3)[0];
  const LayerState copy = with_tensors(state, tensors_of(state));
  EXPECT_TRUE(copy.ring_mass.is_same(state.ring_mass));
  EXPECT_TRUE(copy.lengths.is_same(state.lengths));
  EXPECT_TRUE(copy.k.is_same(state.k));
}

}  // namespace
}  // namespace sparsek::train
