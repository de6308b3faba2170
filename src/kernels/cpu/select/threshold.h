// The SparseK threshold of a sorted list (eq. 2), in double.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

namespace sparsek::cpu {

// The list's first num_ones keys have p = 1 and the next (num_support - num_ones) a fraction, in exact arithmetic.
struct Threshold {
  double tau = -std::numeric_limits<double>::infinity();
  int64_t num_ones = 0, num_support = 0;
};

// score(i), i in [0, count), descends. tau -inf (every p is 1) unless count > topk.
template <class Score>
Threshold sparsek_threshold(Score&& score, int64_t count, int64_t topk) {
  Threshold result;
  if (count <= topk) return result;
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  int64_t ones = 0, support = 0;
  double sum = 0;  // of the scores in [ones, support)
  // Lower tau from breakpoint to breakpoint (a key enters at u, is full at u - 1) until sum p reaches topk.
  for (;;) {
    const double enters = support < count ? double{score(support)} : kNone;
    const double fills = ones < support ? double{score(ones)} - 1 : kNone;
    const auto fractional = static_cast<double>(support - ones);
    const double rest = fractional > 0 ? fractional * std::max(enters, fills) : 0;
    if (sum + static_cast<double>(ones) - rest >= static_cast<double>(topk)) break;
    if (enters == kNone && fills == kNone) break;  // only when scores overflow
    if (enters >= fills) {
      sum += score(support++);
    } else {
      sum = ones + 1 == support ? 0 : sum - score(ones);
      ++ones;
    }
  }
  result.num_ones = ones;
  result.num_support = support;
  result.tau = ones < support ? (sum + static_cast<double>(ones - topk)) / static_cast<double>(support - ones)
                              : double{score(ones - 1)} - 1;
  return result;
}

}  // namespace sparsek::cpu
