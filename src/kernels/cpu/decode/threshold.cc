// Bracketed Newton iteration on the piecewise linear function of eq. 2. Each step costs two binary searches and the sum
// of the fractional range, so no prefix sums over the whole pool are needed.
#include "kernels/cpu/decode/threshold.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace sparsek::cpu {
namespace {

template <class Score>
double sum_range(const Score* begin, const Score* end) {
  double sums[4] = {};
  for (; begin + 4 <= end; begin += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(begin[i]);
  }
  for (; begin < end; ++begin) sums[0] += static_cast<double>(*begin);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

template <class Score>
double sorted_threshold(const Score* scores, int count, int k) {
  assert(k >= 1 && count > k);
  const double kth = scores[k - 1];
  // The k largest alone make the sum k, and nothing is fractional: the largest root is where the k-th begins to fall.
  if (static_cast<double>(scores[k]) <= kth - 1) return kth - 1;

  // Now the root is unique and inside (kth - 1, kth): the sum is above k at the lower end and below it at the upper.
  double low = kth - 1, high = kth, tau = low;
  for (int step = 0; step < 200; ++step) {
    const Score* full_end =
        std::partition_point(scores, scores + count, [&](Score u) { return static_cast<double>(u) - tau >= 1; });
    const Score* support_end =
        std::partition_point(full_end, scores + count, [&](Score u) { return static_cast<double>(u) > tau; });
    const double num_full = static_cast<double>(full_end - scores);
    const double num_fractional = static_cast<double>(support_end - full_end);
    const double sum = sum_range(full_end, support_end);
    (num_full + sum - num_fractional * tau > k ? low : high) = tau;
    double next = (sum + num_full - k) / num_fractional;  // the root, if no score changes its range on the way there
    if (std::abs(next - tau) <= 1e-15 * std::max(1.0, std::abs(tau))) return next;
    if (!(next > low && next < high)) next = 0.5 * (low + high);
    tau = next;
  }
  return tau;
}

template double sorted_threshold(const float*, int, int);
template double sorted_threshold(const double*, int, int);

}  // namespace sparsek::cpu
