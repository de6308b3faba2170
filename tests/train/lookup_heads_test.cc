// Which heads look things up, against loops over plain attention; and that held slopes stay where they are.
#include "train/lookup_heads.h"

#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/train/tiny.h"
#include "train/optimiser.h"

namespace sparsek::train {
namespace {

TEST(LookupHeads, PayTheFirstTimeOfATextThatComesTwice) {
  const Network network = test::tiny_network({.kind = model::AttentionKind::kDense});
  const int64_t period = 9;
  const at::Tensor text = test::tiny_ids(1, period)[0];
  const at::Tensor found = lookup_scores(network, text);
  ASSERT_EQ(found.sizes(), (std::vector<int64_t>{2, 2}));
  const at::NoGradGuard no_grad;
  const at::Tensor ids = text.repeat({2}).unsqueeze(0);
  network.forward_watched(ids, network.layout(1, 2 * period), [&](int64_t layer, const AttentionInputs& in) {
    for (int64_t kv_head = 0; kv_head < 2; ++kv_head) {
      double most = 0;
      for (int64_t head = 2 * kv_head; head < 2 * kv_head + 2; ++head) {
        double sum = 0;
        for (int64_t query = period; query < 2 * period; ++query) {
          const at::Tensor keys = in.k[0].select(1, kv_head).slice(0, 0, query + 1);
          const at::Tensor row = keys.mv(in.q[0][query][head]).div(std::sqrt(8.0)).softmax(0);
          sum += row[query - period].item<double>();
        }
        most = std::max(most, sum / static_cast<double>(period));
      }
      EXPECT_NEAR(found[layer][kv_head].item<double>(), most, 1e-6) << layer << "." << kv_head;
    }
  });
}

TEST(LookupHeads, HighestFirstAndOfEqualsTheFirst) {
  const at::Tensor scores = at::tensor({0.1, 0.5, 0.7, 0.5, 0.0, 0.2}).view({3, 2});
  const std::vector<HeadIndex> heads = highest_heads(scores, 3);
  ASSERT_EQ(heads.size(), 3U);
  EXPECT_TRUE(heads[0].layer == 1 && heads[0].kv_head == 0);
  EXPECT_TRUE(heads[1].layer == 0 && heads[1].kv_head == 1);
  EXPECT_TRUE(heads[2].layer == 1 && heads[2].kv_head == 1);
  EXPECT_EQ(highest_heads(scores, 100).size(), 6U);
}

TEST(Slopes, StayInTheirRange) {
  Network network = test::tiny_network({});
  at::Tensor& slope = network.parameters().layers[0].slope;
  {
    const at::NoGradGuard no_grad;
    slope.copy_(at::tensor({0.05, 0.01}));
  }
  Optimiser optimiser(network.parameters(), {.scorer_lr = 0.02, .warmup_steps = 0}, 10, 0.06);
  slope.mutable_grad() = at::tensor({-1.0, 1.0}, slope.options());
  ASSERT_TRUE(optimiser.apply(0, true).was_applied);
  EXPECT_EQ(slope[0].item<float>(), 0.06F);
  EXPECT_EQ(slope[1].item<double>(), 0);
}

TEST(LookupHeads, HeldSlopesStay) {
  Network network = test::tiny_network({});
  hold_slopes(network.parameters(), {{1, 0}}, 0.25);
  const at::Tensor before = network.parameters().layers[1].slope.detach().clone();
  EXPECT_EQ(before[0].item<double>(), 0.25);
  Optimiser optimiser(network.parameters(), {.warmup_steps = 0}, 10);
  for (int64_t step = 0; step < 3; ++step) {
    const at::Tensor ids = test::tiny_ids(2, 40, 20 + step);
    network.forward(ids, network.layout(2, 40), nullptr).pow(2).sum().backward();
    ASSERT_TRUE(optimiser.apply(step, true).was_applied);
  }
  const at::Tensor after = network.parameters().layers[1].slope.detach();
  EXPECT_EQ(after[0].item<double>(), 0.25);
  EXPECT_NE(after[1].item<double>(), before[1].item<double>());
}

}  // namespace
}  // namespace sparsek::train
