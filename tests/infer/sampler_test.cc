#include "infer/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "base/error.h"

namespace sparsek {
namespace {

// How often each token is drawn in `count` draws from the same logits.
std::map<int32_t, double> frequencies(const SamplingOptions& options, const std::vector<float>& logits, int count) {
  Sampler sampler(options);
  std::map<int32_t, double> result;
  for (int i = 0; i < count; ++i) {
    std::vector<float> copy = logits;
    result[sampler.sample(copy)] += 1.0 / count;
  }
  return result;
}

TEST(Sampler, GreedyTakesTheFirstOfEqualMaxima) {
  std::vector<float> logits{1, 3, 3, 2};
  EXPECT_EQ(Sampler({}).sample(logits), 1);
}

TEST(Sampler, FrequenciesFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits{0, 1, 2};
  const auto found = frequencies({.temperature = 0.5, .seed = 3}, logits, 200000);
  const double sum = 1 + std::exp(2.0) + std::exp(4.0);
  EXPECT_NEAR(found.at(0), 1 / sum, 0.005);
  EXPECT_NEAR(found.at(1), std::exp(2.0) / sum, 0.005);
  EXPECT_NEAR(found.at(2), std::exp(4.0) / sum, 0.005);
}

TEST(Sampler, LargeLogitsDoNotOverflow) {
  const auto found = frequencies({.temperature = 1}, {1000.0f, 1000.0f, -1000.0f}, 2000);
  EXPECT_EQ(found.size(), 2u);
}

TEST(Sampler, TopKKeepsTheMostLikely) {
  const auto found = frequencies({.temperature = 10, .top_k = 2}, {5, 1, 4, 3}, 2000);
  EXPECT_EQ(found.size(), 2u);
  EXPECT_TRUE(found.contains(0) && found.contains(2));
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  // Probabilities .5 .25 .125 .125.
  const std::vector<float> logits{std::log(.5f), std::log(.25f), std::log(.125f), std::log(.125f)};
  EXPECT_EQ(frequencies({.temperature = 1, .top_p = 0.4}, logits, 2000).size(), 1u);
  EXPECT_EQ(frequencies({.temperature = 1, .top_p = 0.7}, logits, 2000).size(), 2u);
  EXPECT_EQ(frequencies({.temperature = 1, .top_p = 1}, logits, 2000).size(), 4u);
}

TEST(Sampler, MinPIsRelativeToTheMostLikely) {
  const std::vector<float> logits{std::log(.5f), std::log(.3f), std::log(.2f)};
  EXPECT_EQ(frequencies({.temperature = 1, .min_p = 0.5}, logits, 2000).size(), 2u);
}

TEST(Sampler, RepetitionPenaltyCountsOnlyTheWindow) {
  Sampler sampler({.repetition_penalty = 4, .repetition_window = 2});
  const std::vector<float> logits{3, 2, -1};
  for (const int32_t token : {1, 0, 0, 2}) sampler.observe(token);  // 1 is forgotten, 0 counts once
  std::vector<float> copy = logits;
  EXPECT_EQ(sampler.sample(copy), 1);
  EXPECT_FLOAT_EQ(copy[0], 0.75f);
  EXPECT_FLOAT_EQ(copy[1], 2);
  EXPECT_FLOAT_EQ(copy[2], -4);
}

TEST(Sampler, SameSeedSameTokensOtherSeedOthers) {
  const std::vector<float> logits(100, 0.0f);
  const auto draw = [&](uint64_t seed) {
    Sampler sampler({.temperature = 1, .seed = seed});
    std::vector<int32_t> tokens;
    for (int i = 0; i < 20; ++i) {
      std::vector<float> copy = logits;
      tokens.push_back(sampler.sample(copy));
    }
    return tokens;
  };
  EXPECT_EQ(draw(7), draw(7));
  EXPECT_NE(draw(7), draw(8));
}

TEST(Sampler, RefusesWhatIsOutOfRange) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(Sampler({.temperature = -1}), UsageError);
  EXPECT_THROW(Sampler({.temperature = nan}), UsageError);
  EXPECT_THROW(Sampler({.top_k = -1}), UsageError);
  EXPECT_THROW(Sampler({.top_p = 0}), UsageError);
  EXPECT_THROW(Sampler({.top_p = nan}), UsageError);
  EXPECT_THROW(Sampler({.min_p = 2}), UsageError);
  for (const double penalty : {0.0, 0.009, 101.0, nan}) {
    EXPECT_THROW(Sampler({.repetition_penalty = penalty}), UsageError) << penalty;
  }
  for (const double penalty : {0.01, 100.0}) EXPECT_NO_THROW(Sampler({.repetition_penalty = penalty})) << penalty;
  std::vector<float> logits{1, std::numeric_limits<float>::quiet_NaN()};
  EXPECT_THROW(Sampler({}).sample(logits), DataError);
}

}  // namespace
}  // namespace sparsek
