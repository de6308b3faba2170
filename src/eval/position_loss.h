// Mean loss by position in the document: buckets 512 wide up to 8,192, then doubling. O(log length) memory.
#pragma once
#include <cstdint>
#include <vector>

namespace sparsek::eval {

struct PositionBucket {
  int64_t from, to;  // positions [from, to)
  int64_t count = 0;
  double sum = 0;  // nats
};

class PositionLoss {
 public:
  // Adds the loss of the token at `position`; positions must not decrease.
  void add(int64_t position, double loss) {
    while (buckets_.empty() || position >= buckets_.back().to) {
      const int64_t from = buckets_.empty() ? 0 : buckets_.back().to;
      buckets_.push_back({from, from < kUniformUntil ? from + kWidth : 2 * from});
    }
    buckets_.back().count += 1;
    buckets_.back().sum += loss;
    count_ += 1;
    sum_ += loss;
  }
  int64_t count() const { return count_; }
  double mean() const { return count_ > 0 ? sum_ / static_cast<double>(count_) : 0; }
  const std::vector<PositionBucket>& buckets() const { return buckets_; }

 private:
  static constexpr int64_t kWidth = 512, kUniformUntil = 8192;
  std::vector<PositionBucket> buckets_;
  int64_t count_ = 0;
  double sum_ = 0;
};

}  // namespace sparsek::eval
