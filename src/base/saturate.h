// Sums and products of counts, none negative, that stop at the largest int64 instead of wrapping. For plans of what may
// be asked for and cannot exist: such a plan has to look too large, not small.
#pragma once
#include <cstdint>
#include <limits>

namespace sparsek {

inline int64_t saturating_add(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() : sum;
}
inline int64_t saturating_multiply(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

}  // namespace sparsek
