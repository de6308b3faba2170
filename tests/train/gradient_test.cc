// The whole model's loss against central differences on every scorer parameter, in float64. Eq. 1b's y counts as a
// constant, but moves with what layers before it do: with delayed scores only the last layer's scorer is compared.
#include <gtest/gtest.h>

#include "tests/train/tiny.h"
#include "train/token_loss.h"

namespace sparsek::train {
namespace {

at::Tensor loss_of(const Network& network, const at::Tensor& ids) {
  const int64_t seqlen = ids.size(1) - 1;
  const at::Tensor hidden = network.forward(ids.narrow(1, 0, seqlen), network.layout(ids.size(0), seqlen), nullptr);
  return token_loss(hidden.flatten(0, 1), network.parameters().output_matrix(), ids.narrow(1, 1, seqlen).reshape({-1}),
                    {.rows = 17})
      .total;
}

struct Case {
  const char* name;
  int64_t hidden, far_distance;
  bool timestep_norm, delayed;
};

class ScorerGradient : public testing::TestWithParam<Case> {};

// With the soft gate the gradient is that of the loss as it is computed, away from ties and changes of the selection.
TEST_P(ScorerGradient, EqualsDifferences) {
  const Case& c = GetParam();
  Network network = test::tiny_network({.far_distance = c.far_distance,
                                        .pool_size = 12,
                                        .hidden = c.hidden,
                                        .timestep_norm = c.timestep_norm,
                                        .delayed = c.delayed});
  const at::Tensor ids = test::tiny_ids(2, 50);
  loss_of(network, ids).backward();
  const at::NoGradGuard no_grad;
  int64_t checked = 0, bad = 0;
  double largest = 0;
  visit_parameters(network.parameters(), [&](const std::string& name, at::Tensor& tensor, Group group) {
    if (!is_of_scorer(group) || (c.delayed && !name.starts_with("layers.1."))) return;
    ASSERT_TRUE(tensor.grad().defined()) << name;
    double* values = tensor.mutable_data_ptr<double>();
    const at::Tensor gradient = tensor.grad().contiguous();
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      const double kept = values[i], wanted = gradient.const_data_ptr<double>()[i];
      // The smaller of two steps' errors: a selection that changes inside the larger one is no error of the gradient.
      double error = 1e300, difference = 0;
      for (const double step : {1e-6, 1e-7}) {
        if (error <= 1e-7) break;
        values[i] = kept + step;
        const double above = loss_of(network, ids).item<double>();
        values[i] = kept - step;
        const double below = loss_of(network, ids).item<double>();
        values[i] = kept;
        difference = (above - below) / (2 * step);
        error = std::min(error, std::abs(difference - wanted));
      }
      largest = std::max(largest, std::abs(wanted));
      ++checked;
      if (!(error <= 1e-5 + 1e-5 * std::abs(wanted))) {
        ++bad;
        ADD_FAILURE() << name << "[" << i << "]: gradient " << wanted << ", differences " << difference;
      }
    }
  });
  EXPECT_GT(checked, 30);
  EXPECT_GT(largest, 1e-2);
  EXPECT_EQ(bad, 0);
}

INSTANTIATE_TEST_SUITE_P(Scorers, ScorerGradient,
                         testing::Values(Case{"linear", 0, 0, true, false}, Case{"mlp_delayed", 6, 0, true, true},
                                         Case{"mlp_far_delayed", 6, 9, true, true},
                                         Case{"linear_plain", 0, 9, false, false}),
                         [](const auto& info) { return info.param.name; });

TEST(ScorerGradient, CutMeansNone) {
  Network network = test::tiny_network({.cut_gradient = true});
  loss_of(network, test::tiny_ids(2, 50)).backward();
  visit_parameters(network.parameters(), [&](const std::string& name, at::Tensor& tensor, Group group) {
    EXPECT_EQ(tensor.grad().defined(), !is_of_scorer(group)) << name;
  });
}

TEST(ScorerGradient, HardGateHasOne) {
  Network network = test::tiny_network({.gate = Gate::kHard});
  loss_of(network, test::tiny_ids(2, 50)).backward();
  visit_parameters(network.parameters(), [&](const std::string& name, at::Tensor& tensor, Group group) {
    if (is_of_scorer(group) && name.find("beta") == std::string::npos) {
      EXPECT_GT(tensor.grad().abs().max().item<double>(), 1e-6) << name;
    }
  });
}

}  // namespace
}  // namespace sparsek::train
