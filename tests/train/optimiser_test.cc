// AdamW against its definition in plain arithmetic, the schedule, clipping, groups, and steps left out.
#include "train/optimiser.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace sparsek::train {
namespace {

Parameters two_tensors() {
  Parameters parameters;
  parameters.embedding = at::full({2, 3}, 0.5, at::kDouble).requires_grad_(true);
  parameters.final_norm = at::full({3}, -0.25, at::kDouble).requires_grad_(true);
  return parameters;
}
void set_gradients(Parameters& parameters, double matrix, double vector) {
  parameters.embedding.mutable_grad() = at::full({2, 3}, matrix, at::kDouble);
  parameters.final_norm.mutable_grad() = at::full({3}, vector, at::kDouble);
}

TEST(Optimiser, IsAdamW) {
  OptimiserOptions options;
  options.lr = 0.01;
  options.warmup_steps = 0;
  options.min_lr_ratio = 1;
  options.clip = 0;
  options.weight_decay = 0.2;
  Parameters parameters = two_tensors();
  Optimiser optimiser(parameters, options, 10);
  double value[2] = {0.5, -0.25}, first[2] = {}, second[2] = {};
  for (int64_t step = 0; step < 4; ++step) {
    const double gradient[2] = {0.3 - 0.2 * static_cast<double>(step), 1.5};
    set_gradients(parameters, gradient[0], gradient[1]);
    ASSERT_TRUE(optimiser.apply(step, true).was_applied);
    for (int i = 0; i < 2; ++i) {
      const auto t = static_cast<double>(step + 1);
      value[i] *= 1 - options.lr * (i == 0 ? options.weight_decay : 0);  // the norm does not decay
      first[i] = options.beta1 * first[i] + (1 - options.beta1) * gradient[i];
      second[i] = options.beta2 * second[i] + (1 - options.beta2) * gradient[i] * gradient[i];
      value[i] -= options.lr * (first[i] / (1 - std::pow(options.beta1, t))) /
                  (std::sqrt(second[i] / (1 - std::pow(options.beta2, t))) + options.eps);
    }
    EXPECT_NEAR(parameters.embedding[1][2].item<double>(), value[0], 1e-12);
    EXPECT_NEAR(parameters.final_norm[0].item<double>(), value[1], 1e-12);
    EXPECT_FALSE(parameters.embedding.grad().defined());
  }
}

TEST(Optimiser, ClipsByTheNormOfAll) {
  OptimiserOptions options;
  options.clip = 1;
  Parameters parameters = two_tensors();
  Optimiser optimiser(parameters, options, 10);
  set_gradients(parameters, 3, 4);
  EXPECT_NEAR(optimiser.apply(0, true).gradient_norm, std::sqrt(6 * 9 + 3 * 16), 1e-9);
  const double clipped = 4 / std::sqrt(6 * 9 + 3 * 16);
  for (const auto& [name, tensor] : optimiser.tensors()) {
    if (name == "first_moment.final_norm") {
      EXPECT_NEAR(tensor[0].item<double>(), (1 - options.beta1) * clipped, 1e-6);
    }
  }
}

TEST(Optimiser, LeavesOutWhatIsNotFinite) {
  Parameters parameters = two_tensors();
  Optimiser optimiser(parameters, {}, 10);
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    set_gradients(parameters, 1, bad);
    EXPECT_FALSE(optimiser.apply(3, true).was_applied);
  }
  set_gradients(parameters, 1, 1);
  EXPECT_FALSE(optimiser.apply(3, false).was_applied);
  EXPECT_EQ(parameters.embedding[0][0].item<double>(), 0.5);
  EXPECT_EQ(optimiser.num_applied(), 0);
  set_gradients(parameters, 1, 1);
  EXPECT_TRUE(optimiser.apply(3, true).was_applied);
  EXPECT_LT(parameters.embedding[0][0].item<double>(), 0.5);
}

TEST(Optimiser, KeepsSlopesAboveZero) {
  Parameters parameters = two_tensors();
  parameters.layers.resize(1);
  parameters.layers[0].slope = at::full({2}, 1e-6, at::kDouble).requires_grad_(true);
  OptimiserOptions options;
  options.warmup_steps = 0;
  Optimiser optimiser(parameters, options, 10);
  set_gradients(parameters, 0, 0);
  parameters.layers[0].slope.mutable_grad() = at::ones({2}, at::kDouble);
  optimiser.apply(0, true);
  EXPECT_EQ(parameters.layers[0].slope.max().item<double>(), 0);
}

// Adam's first step is as large as the rate: it shows which one a tensor has.
TEST(Optimiser, ScalesHaveTheirOwnRate) {
  for (const double scale_lr : {-1.0, 0.5}) {
    Parameters parameters = two_tensors();
    parameters.layers.resize(1);
    LayerParameters& layer = parameters.layers[0];
    const std::vector<at::Tensor*> scales = {&layer.slope, &layer.gamma, &layer.alpha};
    const std::vector<at::Tensor*> others = {&layer.scorer, &layer.beta};
    for (at::Tensor* tensor : {scales[0], scales[1], scales[2], others[0], others[1]}) {
      *tensor = at::full({2}, 3.0, at::kDouble).requires_grad_(true);
      tensor->mutable_grad() = at::ones({2}, at::kDouble);
    }
    Optimiser optimiser(parameters, {.scorer_lr = 1e-2, .scale_lr = scale_lr, .warmup_steps = 0, .clip = 0}, 10);
    set_gradients(parameters, 0, 0);
    optimiser.apply(0, true);
    for (const at::Tensor* tensor : scales) {
      EXPECT_NEAR(tensor->max().item<double>(), 3 - (scale_lr < 0 ? 1e-2 : scale_lr), 1e-6);
    }
    for (const at::Tensor* tensor : others) EXPECT_NEAR(tensor->max().item<double>(), 3 - 1e-2, 1e-6);
  }
}

TEST(RateFactor, WarmsUpAndFalls) {
  OptimiserOptions options;
  options.warmup_steps = 10;
  options.min_lr_ratio = 0.1;
  EXPECT_NEAR(rate_factor(options, 0, 110), 0.1, 1e-12);
  EXPECT_NEAR(rate_factor(options, 9, 110), 1, 1e-12);
  EXPECT_NEAR(rate_factor(options, 10, 110), 1, 1e-12);
  EXPECT_NEAR(rate_factor(options, 60, 110), 0.55, 1e-12);
  EXPECT_NEAR(rate_factor(options, 110, 110), 0.1, 1e-12);
  EXPECT_NEAR(rate_factor(options, 500, 110), 0.1, 1e-12);
  options.warmup_steps = 0;
  EXPECT_EQ(rate_factor(options, 0, 0), 1);
}

}  // namespace
}  // namespace sparsek::train
