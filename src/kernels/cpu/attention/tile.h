// Register-blocked products of small row-major tiles with packed panels, for float32 and for bfloat16 with float32
// accumulators. Included by *.simd.cc files only.
//
// A panel is kPanelKeys keys in one of two layouts (BFloat16 in brackets: two steps of the inner sum side by side, as
// dot_bf16 wants them):
//   columns: [head_dim][keys]  [head_dim / 2][keys][2]   the keys are the columns of the result (S = Q K^T)
//   rows:    [keys][padded]    [keys / 2][padded][2]     the keys are summed over (O += P V); padded = head_dim rounded
//                                                        up to kPadding, zeros behind head_dim
#pragma once
#include "kernels/cpu/attention/plan.h"
#include "kernels/cpu/simd/vec.h"

namespace sparsek::cpu::SPARSEK_ISA {

// 6 x 4 vectors are 24 accumulators, 4 of B and one of A: 29 of the 32 registers of AVX-512. Of 16: 6 x 2 and 3 more.
inline constexpr int kMicroRows = 6;
#if defined(SPARSEK_ISA_AVX512)
inline constexpr int kMicroVectors = 4;
#else
inline constexpr int kMicroVectors = 2;
#endif
inline constexpr int kPadding = 16;

SPARSEK_INLINE int padded(int head_dim) {
  return (head_dim + kPadding - 1) / kPadding * kPadding;
}

// How many steps of the inner sum one multiply-add takes.
template <class T>
inline constexpr int kStep = sizeof(T) == 2 ? 2 : 1;

// acc[r][v] += sum over n < steps of a[r * a_row + n * a_step] * B[n][v]. The first half of the vectors of step n lies
// at b0 + n * b_step, the second at b1 + n * b_step: they may come from two panels.
template <int kRows, int kVectors>
SPARSEK_INLINE void accumulate(VecF (&acc)[kRows][kVectors], const float* a, int64_t a_row, int64_t a_step,
                               const float* b0, const float* b1, int64_t b_step, int steps) {
  constexpr int kHalf = (kVectors + 1) / 2;
  for (int n = 0; n < steps; ++n) {
    VecF b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load(v < kHalf ? b0 + v * kLanes : b1 + (v - kHalf) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF x = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += x * b[v];
    }
    a += a_step;
    b0 += b_step;
    b1 += b_step;
  }
}

// The same on pairs: a[r * a_row + n * a_step] is the first of a pair, steps counts pairs.
template <int kRows, int kVectors>
SPARSEK_INLINE void accumulate(VecF (&acc)[kRows][kVectors], const BFloat16* a, int64_t a_row, int64_t a_step,
                               const BFloat16* b0, const BFloat16* b1, int64_t b_step, int steps) {
  constexpr int kHalf = (kVectors + 1) / 2;
  for (int n = 0; n < steps; ++n) {
    VecBF b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      b[v] = load_pairs(v < kHalf ? b0 + v * 2 * kLanes : b1 + (v - kHalf) * 2 * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecBF x = splat_pair(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = dot_bf16(acc[r][v], x, b[v]);
    }
    a += a_step;
    b0 += b_step;
    b1 += b_step;
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
// f(Constant<rows>) for rows in 1..kMicroRows.
template <class F>
SPARSEK_INLINE void with_rows(int rows, const F& f) {
  switch (rows) {
    case 6:
      return f(Constant<6>{});
    case 5:
      return f(Constant<5>{});
    case 4:
      return f(Constant<4>{});
    case 3:
      return f(Constant<3>{});
    case 2:
      return f(Constant<2>{});
    default:
      return f(Constant<1>{});
  }
}

// One register block of multiply_columns.
template <int kRows, int kVectors, class T, class Finish>
__attribute__((noinline)) void column_block(const T* a, int64_t a_row, const T* b0, const T* b1, int depth, int row,
                                            int column, const Finish& finish) {
  VecF acc[kRows][kVectors] = {};
  accumulate<kRows, kVectors>(acc, a, a_row, kStep<T>, b0, b1, kPanelKeys * kStep<T>, depth / kStep<T>);
  finish(acc, row, column);
}

// A[rows][depth] times panels in the columns layout. finish(acc, row, column) takes each register block of the result,
// VecF[rows][vectors], from that row and column on.
template <class T, class Finish>
SPARSEK_INLINE void multiply_columns(const T* a, int64_t a_row, int rows, int depth, const T* const* panels,
                                     int num_panels, const Finish& finish) {
  constexpr int kPerPanel = kPanelKeys / kLanes, kHalf = kMicroVectors / 2;
  const int num_vectors = num_panels * kPerPanel;
  const auto vector = [&](int n) { return panels[n / kPerPanel] + n % kPerPanel * kLanes * kStep<T>; };
  for (int v = 0; v < num_vectors; v += kMicroVectors) {
    const T* b0 = vector(v);
    const bool full = v + kMicroVectors <= num_vectors;
    const T* b1 = full ? vector(v + kHalf) : b0 + kLanes * kStep<T>;
    for (int r = 0; r < rows; r += kMicroRows) {
      with_rows(rows - r < kMicroRows ? rows - r : kMicroRows, [&](auto n) {
        if (full) {
          column_block<n.value, kMicroVectors>(a + r * a_row, a_row, b0, b1, depth, r, v * kLanes, finish);
        } else {  // one panel is left of two: only where a panel is half a block
          column_block<n.value, 2>(a + r * a_row, a_row, b0, b1, depth, r, v * kLanes, finish);
        }
      });
    }
  }
}

// The simplest way to finish: out[rows][columns] = alpha * result.
struct StoreScaled {
  template <int kRows, int kVectors>
  SPARSEK_INLINE void operator()(const VecF (&acc)[kRows][kVectors], int row, int column) const {
    float* to = out + row * stride + column;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(to + r * stride + v * kLanes, acc[r][v] * alpha);
    }
  }
  float* out;
  int64_t stride;
  float alpha;
};

// One register block of multiply_rows.
template <int kRows, int kVectors, class T>
__attribute__((noinline)) void row_block(const T* a, int64_t a_row, int64_t a_step, const T* const* panels,
                                         int num_panels, int panel_depth, int64_t offset, int64_t b_step, float* out,
                                         int64_t out_row) {
  VecF acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(out + r * out_row + v * kLanes);
  }
  const int steps = panel_depth / kStep<T>;
  for (int n = 0; n < num_panels; ++n) {
    const T* b = panels[n] + offset;
    accumulate<kRows, kVectors>(acc, a + n * steps * a_step, a_row, a_step, b,
                                b + (kVectors + 1) / 2 * kLanes * kStep<T>, b_step, steps);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes, acc[r][v]);
  }
}

// out[rows][columns] += A times panels in the rows layout, each panel_depth (a multiple of kStep) long; columns is a
// multiple of kPadding. Element (r, step n) of A lies at a[r * a_row + n * a_step].
template <class T>
SPARSEK_INLINE void multiply_rows(const T* a, int64_t a_row, int64_t a_step, int rows, const T* const* panels,
                                  int num_panels, int panel_depth, int columns, float* out, int64_t out_row) {
  const int64_t b_step = columns * kStep<T>;
  const int num_vectors = columns / kLanes;
  for (int v = 0; v < num_vectors;) {
    const int left = num_vectors - v, width = left >= kMicroVectors ? kMicroVectors : left >= 2 ? 2 : 1;
    for (int r = 0; r < rows; r += kMicroRows) {
      with_rows(rows - r < kMicroRows ? rows - r : kMicroRows, [&](auto n) {
        const T* a_block = a + r * a_row;
        float* out_block = out + r * out_row + v * kLanes;
        const int64_t offset = v * kLanes * kStep<T>;
        if (width == kMicroVectors) {
          row_block<n.value, kMicroVectors>(a_block, a_row, a_step, panels, num_panels, panel_depth, offset, b_step,
                                            out_block, out_row);
        } else if (width == 2) {
          row_block<n.value, 2>(a_block, a_row, a_step, panels, num_panels, panel_depth, offset, b_step, out_block,
                                out_row);
        } else {
          row_block<n.value, 1>(a_block, a_row, a_step, panels, num_panels, panel_depth, offset, b_step, out_block,
                                out_row);
        }
      });
    }
    v += width;
  }
}

// 2^x with relative error below 2e-7 (T float) or 4e-6 (T BFloat16: what it feeds is rounded to 8 bits); 0 far below
// -126; above 127 infinite, NaN or at least 2^126, so that a sum shows it.
template <class T>
SPARSEK_INLINE VecF exp2_of(VecF x) {
#if defined(SPARSEK_ISA_AVX512)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)x, 8);
  const VecF r = x - n;
#else
  const VecF clamped = min(max(splat(-126.0f), x), splat(128.0f));
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  VecF shifted = clamped + magic;
  asm("" : "+x"(shifted));  // or the compiler may fold the two additions
  const VecF n = shifted - magic;
  const VecF r = clamped - n;
#endif
  VecF p;
  if constexpr (sizeof(T) == 2) {
    p = splat(9.570102207e-3f);
    p = p * r + 5.591785908e-2f;
    p = p * r + 2.402474433e-1f;
    p = p * r + 6.931217909e-1f;
  } else {
    p = splat(1.327647245e-3f);
    p = p * r + 9.675540961e-3f;
    p = p * r + 5.550713093e-2f;
    p = p * r + 2.402212024e-1f;
    p = p * r + 6.931469440e-1f;
  }
  p = p * r + 1.0f;
#if defined(SPARSEK_ISA_AVX512)
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VecF result = (VecF)((VecI)p + (__builtin_convertvector(n, VecI) << 23));
  return select((VecI)(x < -126.0f), splat(0.0f), result);
#endif
}

}  // namespace sparsek::cpu::SPARSEK_ISA
