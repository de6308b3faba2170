// Scores must be finite (eq. 1): the error that names the first one that is not.
#pragma once
#include <cmath>
#include <cstdint>

#include "base/error.h"
#include "kernels/params.h"

namespace sparsek::cpu {

// Throws for the first value in order of batch row, position, head. wanted(b, i) says whether position i of batch row b
// counts.
template <class T, class Wanted>
[[noreturn]] void throw_not_finite(const char* what, const T* values, const Strides& strides, int64_t batch,
                                   int64_t seqlen, int64_t num_kv_heads, Wanted&& wanted) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < seqlen; ++i) {
      for (int64_t h = 0; h < num_kv_heads; ++h) {
        const T value = values[b * strides.batch + i * strides.seq + h * strides.head];
        if (wanted(b, i) && !std::isfinite(value)) {
          throw_data("{} must be finite, got {} at batch row {}, position {}, head {}", what, value, b, i, h);
        }
      }
    }
  }
  throw_data("{} must be finite", what);
}

}  // namespace sparsek::cpu
