// cross_entropy against double loops: sizes around the block of 1,024, offsets, ties, infinities and NaN.
#include "kernels/cpu/elementwise/elementwise.h"
#include "tests/kernels/elementwise/elements.h"

namespace sparsek::test {
namespace {

using CrossEntropyTest = EveryIsa;

struct Result {
  std::vector<double> loss;
  std::vector<int32_t> argmax;
};

Result run(Elements& logits, const std::vector<int32_t>& targets, int64_t stride, int vocab) {
  const int rows = static_cast<int>(targets.size());
  Result result{std::vector<double>(rows, std::nan("")), std::vector<int32_t>(rows, -1)};
  cpu::cross_entropy({.logits = logits.floats(),
                      .targets = targets.data(),
                      .loss = result.loss.data(),
                      .argmax = result.argmax.data(),
                      .logits_stride = stride,
                      .rows = rows,
                      .vocab = vocab});
  return result;
}

TEST_P(CrossEntropyTest, RandomRows) {
  for (const int vocab : {1, 2, 15, 16, 33, 1023, 1024, 1025, 2049, 49152}) {
    for (const double offset : {0.0, 1000.0, -1000.0}) {
      SCOPED_TRACE(::testing::Message() << "vocab " << vocab << " offset " << offset);
      std::mt19937 random(vocab);
      std::normal_distribution<double> normal(offset, 4);
      const int rows = 3;
      const int64_t stride = vocab + 5;
      Elements logits(DType::kF32, rows * stride);  // NaN between the rows
      std::vector<int32_t> targets(rows);
      for (int row = 0; row < rows; ++row) {
        for (int c = 0; c < vocab; ++c) logits.set(row * stride + c, normal(random));
        targets[row] = static_cast<int32_t>(random() % vocab);
      }
      const Result result = run(logits, targets, stride, vocab);
      for (int row = 0; row < rows; ++row) {
        int best = 0;
        for (int c = 1; c < vocab; ++c) {
          if (logits[row * stride + c] > logits[row * stride + best]) best = c;
        }
        const double maximum = logits[row * stride + best];
        double sum = 0;
        for (int c = 0; c < vocab; ++c) sum += std::exp(logits[row * stride + c] - maximum);
        const double wanted = std::log(sum) + maximum - logits[row * stride + targets[row]];
        EXPECT_TRUE(std::abs(result.loss[row] - wanted) <= 1e-6 * std::max(1.0, wanted)) << result.loss[row] - wanted;
        EXPECT_EQ(result.argmax[row], best);
      }
    }
  }
}

TEST_P(CrossEntropyTest, TiesTakeTheSmallestIndex) {
  const int vocab = 3000;
  for (const int first : {0, 5, 17, 1023, 1024, 2047, 2990}) {
    Elements logits(DType::kF32, vocab);
    for (int c = 0; c < vocab; ++c) logits.set(c, c >= first && (c - first) % 7 == 0 ? 2 : -1);
    EXPECT_EQ(run(logits, {0}, vocab, vocab).argmax[0], first);
  }
}

TEST_P(CrossEntropyTest, OneHotAndMasked) {
  const int vocab = 2000;
  Elements logits(DType::kF32, vocab);
  for (int c = 0; c < vocab; ++c) logits.set(c, -INFINITY);
  logits.set(1500, 3);
  EXPECT_EQ(run(logits, {1500}, vocab, vocab).loss[0], 0);
  EXPECT_EQ(run(logits, {7}, vocab, vocab).loss[0], INFINITY);
  EXPECT_EQ(run(logits, {7}, vocab, vocab).argmax[0], 1500);
}

TEST_P(CrossEntropyTest, ANaNMakesItsRowNaN) {
  const int vocab = 1500;
  for (const int at : {0, 3, 700, 1023, 1024, 1499}) {
    Elements logits(DType::kF32, 2 * vocab);
    for (int i = 0; i < 2 * vocab; ++i) logits.set(i, i == at ? std::nan("") : 0.001 * i);
    const Result result = run(logits, {5, 5}, vocab, vocab);
    EXPECT_TRUE(std::isnan(result.loss[0])) << at;
    EXPECT_TRUE(std::isfinite(result.loss[1])) << at;
    EXPECT_TRUE(result.argmax[0] >= 0 && result.argmax[0] < vocab);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, CrossEntropyTest, all_isas(), isa_name);

}  // namespace
}  // namespace sparsek::test
