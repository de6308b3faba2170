// The blockwise loss against the plain one made of torch's own operations: value and gradients, ignored targets, a
// teacher, a frozen output matrix.
#include "train/token_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

namespace sparsek::train {
namespace {

struct Inputs {
  at::Tensor hidden = at::randn({37, 8}, at::kDouble).requires_grad_(true);
  at::Tensor output = at::randn({19, 8}, at::kDouble).requires_grad_(true);
  at::Tensor targets = at::randint(0, 19, {37}, at::kLong);
  Teacher teacher{at::randn({37, 8}, at::kDouble), at::randn({19, 8}, at::kDouble)};
};

double difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(TokenLoss, EqualsPlainOperations) {
  Inputs in;
  in.targets.narrow(0, 10, 5).fill_(kIgnored);
  for (const int64_t rows : {1, 8, 36, 37, 100}) {
    const TokenLoss loss =
        token_loss(in.hidden, in.output, in.targets, {.next_token = 0.7, .kl = 0.4, .rows = rows}, in.teacher);
    const at::Tensor log_p = at::log_softmax(at::linear(in.hidden, in.output), -1);
    const at::Tensor log_t = at::log_softmax(at::linear(in.teacher.hidden, in.teacher.output), -1);
    const at::Tensor valid = in.targets.ne(kIgnored);
    const at::Tensor next =
        at::cross_entropy_loss(at::linear(in.hidden, in.output), in.targets, {}, at::Reduction::Sum, kIgnored);
    const at::Tensor kl = ((log_t.exp() * (log_t - log_p)).sum(-1) * valid).sum();
    const at::Tensor wanted = next * 0.7 + kl * 0.4;
    EXPECT_NEAR(loss.next_token.item<double>(), next.item<double>(), 1e-10);
    EXPECT_NEAR(loss.kl.item<double>(), kl.item<double>(), 1e-10);
    EXPECT_NEAR(loss.total.item<double>(), wanted.item<double>(), 1e-10);
    (loss.total * 3).backward();
    const at::Tensor dhidden = in.hidden.grad(), doutput = in.output.grad();
    in.hidden.mutable_grad() = at::Tensor();
    in.output.mutable_grad() = at::Tensor();
    (wanted * 3).backward();
    EXPECT_LT(difference(dhidden, in.hidden.grad()), 1e-10) << rows;
    EXPECT_LT(difference(doutput, in.output.grad()), 1e-10) << rows;
    in.hidden.mutable_grad() = at::Tensor();
    in.output.mutable_grad() = at::Tensor();
  }
}

TEST(TokenLoss, FrozenOutputAndNoGrad) {
  Inputs in;
  in.output.requires_grad_(false);
  token_loss(in.hidden, in.output, in.targets, {}).total.backward();
  EXPECT_TRUE(in.hidden.grad().defined());
  EXPECT_FALSE(in.output.grad().defined());
  const at::NoGradGuard no_grad;
  const TokenLoss loss = token_loss(in.hidden, in.output, in.targets, {.rows = 5});
  EXPECT_FALSE(loss.total.requires_grad());
  EXPECT_NEAR(token_scores(in.hidden, in.output, in.targets, 7).losses.sum().item<double>(), loss.total.item<double>(),
              1e-10);
}

TEST(TokenLoss, NothingToPredict) {
  Inputs in;
  in.targets.fill_(kIgnored);
  const TokenLoss loss = token_loss(in.hidden, in.output, in.targets, {}, in.teacher);
  EXPECT_EQ(loss.total.item<double>(), 0);
  loss.total.backward();
  EXPECT_EQ(in.hidden.grad().abs().max().item<double>(), 0);
}

TEST(TokenLoss, Hits) {
  Inputs in;
  const at::NoGradGuard no_grad;
  in.targets.copy_(at::linear(in.hidden, in.output).argmax(1));
  in.targets.narrow(0, 0, 4).copy_((in.targets.narrow(0, 0, 4) + 1).remainder(19));
  in.targets.narrow(0, 4, 3).fill_(kIgnored);
  EXPECT_EQ(token_scores(in.hidden, in.output, in.targets, 6).hits.sum().item<int64_t>(), 30);
}

}  // namespace
}  // namespace sparsek::train
