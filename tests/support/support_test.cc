// The comparisons must be able to fail: NaN, one bad row among many, an early row hiding behind a large one, an
// overwritten guard, an element left unwritten.
#include <cmath>

#include "tests/support/compare.h"
#include "tests/support/generate.h"
#include "tests/support/poison.h"

namespace sparsek::test {
namespace {

const double kNan = std::nan("");

TEST(Compare, NanFailsEverywhere) {
  const Values expected = {1, 2, 3, 4};
  const Values actual = {1, 2, kNan, 4};
  EXPECT_FALSE(rows_close(actual, expected, 2, 1e9, 1e9));
  EXPECT_FALSE(rows_close(expected, actual, 2, 1e9, 1e9));
  EXPECT_FALSE(rows_close(actual, actual, 2, 1e9, 1e9));
  EXPECT_FALSE(rows_close_as_plain(actual, Values{9, 9, 9, 9}, expected, 2));
  EXPECT_FALSE(elements_close(actual, expected, 1e9));
  EXPECT_FALSE(elements_close(expected, actual, 1e9));
  EXPECT_FALSE(close_to_maximum(actual, expected, 1e9));
  EXPECT_FALSE(close_to_maximum(expected, actual, 1e9));
  EXPECT_FALSE(all_equal(actual, actual));
  EXPECT_TRUE(rows_close(expected, expected, 2, 0));
}

TEST(Compare, LimitsAreRelativeToTheRow) {
  const Values expected = {1000, 1000, 0.01, 0.01};
  const Values actual = {1000, 1000, 0.02, 0.01};
  const ::testing::AssertionResult result = rows_close(actual, expected, 2, 1e-2);
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("row 1"), std::string::npos) << result.message();
  EXPECT_FALSE(rows_close_as_plain(actual, Values{1001, 1001, 0.01, 0.01}, expected, 2));
  EXPECT_TRUE(rows_close_as_plain(actual, Values{1000, 1000, 0.016, 0.01}, expected, 2));
}

TEST(Compare, InfinitiesAndSizes) {
  EXPECT_TRUE(elements_close(Values{-INFINITY}, Values{-INFINITY}, 1e-6));
  EXPECT_FALSE(elements_close(Values{-1e30}, Values{-INFINITY}, 1e-6));
  EXPECT_FALSE(elements_close(Values{INFINITY}, Values{-INFINITY}, 1e-6));
  EXPECT_FALSE(elements_close(Values{-INFINITY}, Values{3}, 1e-6));
  EXPECT_FALSE(all_equal(Values{1, 2}, Values{1}));
  EXPECT_FALSE(rows_close(Values{1, 2}, Values{1}, 1, 1));
  EXPECT_FALSE(all_equal(std::vector<int32_t>{5}, std::vector<int64_t>{5 + (int64_t{1} << 32)}));
}

TEST(Poisoned, SeesWritesOutsideAndElementsUnwritten) {
  Poisoned<float> buffer(10);
  EXPECT_TRUE(std::isnan(buffer[9]));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 16u);
  EXPECT_EQ(buffer.first_unwritten(), 0);
  for (int64_t n = 0; n < 10; ++n) buffer[n] = 1;
  EXPECT_EQ(buffer.first_unwritten(), -1);
  EXPECT_GUARDS_INTACT(buffer);
  const float kept = buffer[10];
  buffer[10] = 0;
  EXPECT_FALSE(buffer.guards_intact());
  buffer[10] = kept;
  EXPECT_TRUE(buffer.guards_intact());
  buffer[-1] = 0;
  EXPECT_FALSE(buffer.guards_intact());
  Poisoned<int32_t> integers(3);
  integers[0] = integers[1] = 7;
  EXPECT_EQ(integers.first_unwritten(), 2);
}

TEST(Generate, ScoresDifferAlongEveryAxisAndAreFloat32) {
  for (ScoreKind kind : kAllScoreKinds) {
    const Values scores = make_scores(kind, 2, 50, 3, 7);
    EXPECT_EQ(scores.size(), 300u);
    EXPECT_ALL_EQUAL(round_to_f32(scores), scores);
    EXPECT_TRUE(all_equal(make_scores(kind, 2, 50, 3, 7), scores)) << name(kind);
    EXPECT_FALSE(all_equal(Values(scores.begin(), scores.begin() + 150), Values(scores.begin() + 150, scores.end())))
        << name(kind);
    bool heads_differ = false;
    for (int64_t t = 0; t < 50; ++t) heads_differ |= scores[t * 3] != scores[t * 3 + 1];
    EXPECT_TRUE(heads_differ) << name(kind);
  }
}

}  // namespace
}  // namespace sparsek::test
