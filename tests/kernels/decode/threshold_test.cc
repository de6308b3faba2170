// sorted_threshold: math.md section 2's known values, and the reference on scores of every kind.
#include "kernels/cpu/decode/threshold.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/reference/reference.h"
#include "tests/support/generate.h"

namespace sparsek::test {
namespace {

TEST(SortedThreshold, KnownValues) {
  const auto tau = [](std::vector<double> z, int k) {
    std::sort(z.rbegin(), z.rend());
    return cpu::sorted_threshold(z.data(), static_cast<int>(z.size()), k);
  };
  EXPECT_NEAR(tau({3, 1, 0.2, -1}, 2), 0.1, 1e-15);
  EXPECT_NEAR(tau({.5, .5, .5, .5}, 2), 0, 1e-15);
  EXPECT_NEAR(tau({5, 3, 1, -1}, 2), 2, 1e-15);
  EXPECT_NEAR(tau({2, 1.9, 1.8, 0}, 2), 1.2333333333333334, 1e-15);
  EXPECT_NEAR(tau({.1, .7, .4}, 1), 1.0 / 15, 1e-15);
}

TEST(SortedThreshold, EveryKindOfScores) {
  uint64_t seed = 0;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int count : {2, 3, 10, 97, 1000, 2032}) {
      for (const int k : {1, 2, count / 4, count / 2, count - 1}) {
        if (k < 1 || k >= count) continue;
        SCOPED_TRACE(::testing::Message() << name(kind) << " count " << count << " k " << k << " seed " << ++seed);
        Values z = make_scores(kind, 1, count, 1, seed);
        std::sort(z.rbegin(), z.rend());
        const double wanted = reference::sparsek_operator(z, k, reference::Precision::kFloat64).tau;
        const double tau = cpu::sorted_threshold(z.data(), count, k);
        EXPECT_TRUE(std::abs(tau - wanted) <= 1e-12 * std::max(1.0, std::abs(wanted))) << tau << ", want " << wanted;
        const std::vector<float> z_f32 = to_f32(z);
        EXPECT_EQ(cpu::sorted_threshold(z_f32.data(), count, k), tau);
        double sum = 0;
        for (const double x : z) sum += std::clamp(x - tau, 0.0, 1.0);
        EXPECT_TRUE(std::abs(sum - k) <= 1e-9 * std::max(1.0, std::abs(tau) * count)) << sum;
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::test
