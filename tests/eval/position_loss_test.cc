#include "eval/position_loss.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sparsek::eval {
namespace {

TEST(PositionLoss, BucketsAre512WideTo8192AndThenDouble) {
  PositionLoss loss;
  loss.add(40'000, 1);
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (int64_t from = 0; from < 8192; from += 512) wanted.emplace_back(from, from + 512);
  wanted.emplace_back(8192, 16384);
  wanted.emplace_back(16384, 32768);
  wanted.emplace_back(32768, 65536);
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const PositionBucket& bucket : loss.buckets()) found.emplace_back(bucket.from, bucket.to);
  EXPECT_EQ(found, wanted);
}

TEST(PositionLoss, EachPositionGoesToItsBucket) {
  PositionLoss loss;
  for (const int64_t position : {1, 511, 512, 512, 8191, 8192, 16383, 16384}) loss.add(position, 1.0 + position);
  int64_t counted = 0;
  for (const PositionBucket& bucket : loss.buckets()) {
    const auto [count, sum] = bucket.from == 0       ? std::pair{2, 514.0}
                              : bucket.from == 512   ? std::pair{2, 1026.0}
                              : bucket.from == 7680  ? std::pair{1, 8192.0}
                              : bucket.from == 8192  ? std::pair{2, 8193.0 + 16384.0}
                              : bucket.from == 16384 ? std::pair{1, 16385.0}
                                                     : std::pair{0, 0.0};
    EXPECT_EQ(bucket.count, count) << bucket.from;
    EXPECT_EQ(bucket.sum, sum) << bucket.from;
    counted += bucket.count;
  }
  EXPECT_EQ(counted, loss.count());
}

TEST(PositionLoss, TheMeanIsThatOfAllTokens) {
  PositionLoss loss;
  EXPECT_EQ(loss.count(), 0);
  EXPECT_EQ(loss.mean(), 0);
  loss.add(1, 2);
  loss.add(700, 3);
  loss.add(9000, 7);
  EXPECT_EQ(loss.count(), 3);
  EXPECT_EQ(loss.mean(), 4);
  loss.add(9001, NAN);
  EXPECT_TRUE(std::isnan(loss.mean()));
}

TEST(PositionLoss, GrowsWithTheLogarithmOfTheLength) {
  PositionLoss loss;
  for (int64_t position = 1; position < int64_t{1} << 40; position *= 2) loss.add(position, 1);
  EXPECT_EQ(loss.buckets().size(), 16u + 27u);  // 8K to 1T: 27 doublings
  EXPECT_EQ(loss.count(), 40);
}

}  // namespace
}  // namespace sparsek::eval
