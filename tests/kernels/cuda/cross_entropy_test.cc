// cross_entropy on the GPU against double loops, by row: losses, divergences and the gradient that replaces the logits;
// ignored rows, targets outside the vocabulary, logits far from 0, vocabularies of every alignment.
#include "kernels/cuda/cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/bf16.h"
#include "tests/kernels/cuda/device.h"

namespace sparsek::test {
namespace {

struct Case {
  int64_t rows;
  int vocab_size;
  double scale, offset;
  bool has_teacher;
  float next_token_weight, kl_weight;
};

std::vector<BFloat16> normal(int64_t count, double scale, double offset, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution(offset, scale);
  std::vector<BFloat16> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(to_bf16(static_cast<float>(distribution(generator))));
  return values;
}

double log_sum_exp(const BFloat16* x, int count) {
  double top = -INFINITY, sum = 0;
  for (int i = 0; i < count; ++i) top = std::max(top, double{to_float(x[i])});
  for (int i = 0; i < count; ++i) sum += std::exp(to_float(x[i]) - top);
  return top + std::log(sum);
}

class CudaCrossEntropy : public testing::TestWithParam<Case> {};

TEST_P(CudaCrossEntropy, LossesAndGradient) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  const std::vector<BFloat16> logits = normal(c.rows * c.vocab_size, c.scale, c.offset, 1);
  const std::vector<BFloat16> teacher = normal(c.has_teacher ? c.rows * c.vocab_size : 0, c.scale, -c.offset, 2);
  std::vector<int64_t> targets(c.rows);
  for (int64_t r = 0; r < c.rows; ++r) targets[r] = (r * 7919) % c.vocab_size;
  targets.back() = c.vocab_size - 1;
  if (c.rows > 3) targets[1] = -100, targets[2] = c.vocab_size;  // ignored; outside
  const DeviceArray<BFloat16> device_teacher(teacher);
  const DeviceArray<int64_t> device_targets(targets);
  for (const bool writes_gradient : {false, true}) {
    const DeviceArray<BFloat16> device_logits(logits);
    const DeviceArray<float> losses(c.rows), divergences(c.has_teacher ? c.rows : 0);
    cuda::cross_entropy({.logits = device_logits.data(),
                         .teacher = c.has_teacher ? device_teacher.data() : nullptr,
                         .targets = device_targets.data(),
                         .losses = losses.data(),
                         .divergences = c.has_teacher ? divergences.data() : nullptr,
                         .rows = c.rows,
                         .vocab_size = c.vocab_size,
                         .next_token_weight = c.next_token_weight,
                         .kl_weight = c.kl_weight,
                         .writes_gradient = writes_gradient},
                        nullptr);
    const std::vector<BFloat16> gradient = device_logits.to_vector();
    const std::vector<float> loss = losses.to_vector(), divergence = divergences.to_vector();
    for (int64_t r = 0; r < c.rows; ++r) {
      const BFloat16 *x = logits.data() + r * c.vocab_size, *g = gradient.data() + r * c.vocab_size;
      if (!writes_gradient) {
        for (int i = 0; i < c.vocab_size; ++i) ASSERT_EQ(g[i].bits, x[i].bits) << "row " << r;
      }
      if (targets[r] == -100) {
        EXPECT_EQ(loss[r], 0.0f);
        if (c.has_teacher) {
          EXPECT_EQ(divergence[r], 0.0f);
        }
        for (int i = 0; writes_gradient && i < c.vocab_size; ++i) ASSERT_EQ(g[i].bits, 0) << "row " << r;
        continue;
      }
      if (targets[r] == c.vocab_size) {
        EXPECT_TRUE(std::isnan(loss[r])) << "row " << r;
        for (int i = 0; writes_gradient && i < c.vocab_size; ++i)
          ASSERT_TRUE(std::isnan(to_float(g[i]))) << "row " << r;
        continue;
      }
      const double lse = log_sum_exp(x, c.vocab_size), size = 1 + std::abs(lse) + std::abs(c.offset);
      EXPECT_TRUE(std::abs(loss[r] - (lse - to_float(x[targets[r]]))) <= 2e-6 * size) << "row " << r << ": " << loss[r];
      std::vector<double> wanted(c.vocab_size);
      const BFloat16* y = teacher.data() + r * c.vocab_size;
      double lse_teacher = 0, kl = 0;
      if (c.has_teacher) {
        lse_teacher = log_sum_exp(y, c.vocab_size);
        for (int i = 0; i < c.vocab_size; ++i) {
          const double log_t = to_float(y[i]) - lse_teacher;
          kl += std::exp(log_t) * (log_t - (to_float(x[i]) - lse));
        }
        EXPECT_TRUE(std::abs(divergence[r] - kl) <= 5e-6 * (size + std::abs(kl)))
            << "row " << r << ": " << divergence[r] << " for " << kl;
      }
      if (!writes_gradient) continue;
      for (int i = 0; i < c.vocab_size; ++i) {
        const double p = std::exp(to_float(x[i]) - lse), t = c.has_teacher ? std::exp(to_float(y[i]) - lse_teacher) : 0;
        const double own = c.next_token_weight * (p - (i == targets[r])),
                     other = c.has_teacher ? c.kl_weight * (p - t) : 0;
        const double parts =
            c.next_token_weight * (p + (i == targets[r])) + (c.has_teacher ? c.kl_weight * (p + t) : 0);
        // bfloat16's rounding of the result; float32's of p and of what cancels.
        ASSERT_TRUE(std::abs(to_float(g[i]) - (own + other)) <= std::abs(own + other) / 256 + 2e-5 * parts + 1e-37)
            << "row " << r << ", column " << i << ": " << to_float(g[i]) << " for " << own + other;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaCrossEntropy,
                         testing::Values(Case{5, 49152, 2, 0, false, 1, 0}, Case{7, 1000, 3, 50, false, 0.7f, 0},
                                         Case{9, 23, 1, 0, false, 1, 0}, Case{1, 1, 1, 0, false, 1, 0},
                                         Case{5, 50001, 4, -30, false, 1, 0}, Case{5, 49152, 2, 3, true, 0.5f, 0.4f},
                                         Case{6, 8200, 6, 0, true, 0, 1}, Case{6, 37, 1, 0, true, 1, 1}));

}  // namespace
}  // namespace sparsek::test
