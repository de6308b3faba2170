// Rows of a strided tensor into the panel layouts of tile.h. Included by *.simd.cc files only.
#pragma once
#include <utility>

#include "kernels/cpu/attention/tile.h"

namespace sparsek::cpu::SPARSEK_ISA {

// One row into column `column` of a panel in the columns layout.
SPARSEK_INLINE void pack_column(float* panel, int column, const float* row, int head_dim) {
  for (int c = 0; c < head_dim; ++c) panel[c * kPanelKeys + column] = row[c];
}
SPARSEK_INLINE void pack_column(BFloat16* panel, int column, const BFloat16* row, int head_dim) {
  for (int c = 0; c < head_dim; c += 2) std::memcpy(panel + c * kPanelKeys + 2 * column, row + c, 2 * sizeof(BFloat16));
}

// One row into row n of a panel in the rows layout.
SPARSEK_INLINE void pack_row(float* panel, int n, const float* row, int head_dim) {
  std::memcpy(panel + n * padded(head_dim), row, static_cast<size_t>(head_dim) * sizeof(float));
}
SPARSEK_INLINE void pack_row(BFloat16* panel, int n, const BFloat16* row, int head_dim) {
  BFloat16* out = panel + n / 2 * 2 * padded(head_dim) + n % 2;
  for (int c = 0; c < head_dim; ++c) out[2 * c] = row[c];
}

// Exchanges, between rows i and i + kDistance, the blocks of kDistance lanes that a transposition moves; doing it for
// every power of two below kLanes transposes the square.
template <int kDistance, int... kLane>
SPARSEK_INLINE void transpose_step(VecU (&rows)[kLanes], std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const VecU a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shufflevector(a, b, (kLane & kDistance ? kLanes + kLane - kDistance : kLane)...);
    rows[i + kDistance] = __builtin_shufflevector(a, b, (kLane & kDistance ? kLanes + kLane : kLane + kDistance)...);
  }
}

// kLanes rows of kLanes 32-bit elements, transposed.
SPARSEK_INLINE void transpose_square(const char* from, int64_t stride_bytes, char* to, int64_t to_stride_bytes) {
  VecU rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&rows[i], from + i * stride_bytes, sizeof(VecU));
  const auto lanes = std::make_integer_sequence<int, kLanes>{};
  transpose_step<1>(rows, lanes);
  transpose_step<2>(rows, lanes);
  if constexpr (kLanes >= 8) transpose_step<4>(rows, lanes);
  if constexpr (kLanes >= 16) transpose_step<8>(rows, lanes);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * to_stride_bytes, &rows[i], sizeof(VecU));
}

// kPanelKeys rows into a panel in the columns layout. A column of it is 32 bits wide: one float or two bfloat16.
template <class T>
SPARSEK_INLINE void pack_columns(T* panel, const T* rows, int64_t stride, int head_dim) {
  constexpr int kPerColumn = 4 / sizeof(T);
  const int columns = head_dim / kPerColumn;
  int c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    for (int n = 0; n < kPanelKeys; n += kLanes) {
      transpose_square(reinterpret_cast<const char*>(rows + n * stride + c * kPerColumn),
                       stride * static_cast<int64_t>(sizeof(T)),
                       reinterpret_cast<char*>(panel) + (c * kPanelKeys + n) * 4, kPanelKeys * 4);
    }
  }
  if (c == columns) return;
  for (int n = 0; n < kPanelKeys; ++n) {
    pack_column(panel + c * kPanelKeys * kPerColumn, n, rows + n * stride + c * kPerColumn, head_dim - c * kPerColumn);
  }
}

// kPanelKeys rows into a panel in the rows layout.
SPARSEK_INLINE void pack_rows(float* panel, const float* rows, int64_t stride, int head_dim) {
  for (int n = 0; n < kPanelKeys; ++n) pack_row(panel, n, rows + n * stride, head_dim);
}
SPARSEK_INLINE void pack_rows(BFloat16* panel, const BFloat16* rows, int64_t stride, int head_dim) {
  for (int n = 0; n < kPanelKeys; n += 2) {
    const BFloat16 *even = rows + n * stride, *odd = even + stride;
    BFloat16* out = panel + n * padded(head_dim);
    int c = 0;
    for (; c + kLanes <= head_dim; c += kLanes) {
      VecH low, high;
      std::memcpy(&low, even + c, sizeof low);
      std::memcpy(&high, odd + c, sizeof high);
      const VecU pairs = __builtin_convertvector(low, VecU) | (__builtin_convertvector(high, VecU) << 16);
      std::memcpy(out + 2 * c, &pairs, sizeof pairs);
    }
    for (; c < head_dim; ++c) {
      out[2 * c] = even[c];
      out[2 * c + 1] = odd[c];
    }
  }
}

// Asks for the cache lines of rows that a later tile will read: they are strided, which the processor does not foresee.
template <class T>
SPARSEK_INLINE void prefetch_rows(const T* from, int64_t stride, int rows, int row_size) {
  constexpr int kLine = 64 / sizeof(T);
  for (int n = 0; n < rows; ++n) {
    for (int c = 0; c < row_size; c += kLine) __builtin_prefetch(from + n * stride + c, 0, 2);
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
