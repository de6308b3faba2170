// What the elementwise kernels share: whole and partial vectors of either element type, and the loop over rows.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels/cpu/simd/vec.h"

namespace sparsek::cpu::SPARSEK_ISA {

SPARSEK_INLINE VecF load_elements(const float* p) {
  return load(p);
}
SPARSEK_INLINE VecF load_elements(const BFloat16* p) {
  return load_bf16(p);
}
SPARSEK_INLINE void store_elements(float* p, VecF x) {
  store(p, x);
}
SPARSEK_INLINE void store_elements(BFloat16* p, VecF x) {
  store_bf16(p, x);
}

// The first `count` < kLanes elements; the other lanes read as zero and are not written.
template <class T>
SPARSEK_INLINE VecF load_elements(const T* p, int count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * count);
  return load_elements(lanes);
}
template <class T>
SPARSEK_INLINE void store_elements(T* p, VecF x, int count) {
  T lanes[kLanes];
  store_elements(lanes, x);
  std::memcpy(p, lanes, sizeof(T) * count);
}

// body(row) for every row, on all OpenMP threads when there are at least kMinParallelWork elements.
inline constexpr int64_t kMinParallelWork = 32 * 1024;
template <class Body>
SPARSEK_INLINE void for_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  if (rows < 2 || rows * elements_per_row < kMinParallelWork) {
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
