// Many rows of x against packed weights: a block of columns is expanded into a panel that stays in the second-level
// cache, and all rows of x are multiplied with it, a register block of rows x columns at a time. x is streamed once per
// panel, which at 64 columns is far below what the caches deliver.
//
// A panel holds [k][columns] float32, or [k / 2][columns][2] bfloat16 rounded to nearest even (AVX-512 only).
#include "kernels/cpu/linear/expand.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

using packed::kTileRows;

#if defined(SPARSEK_ISA_AVX512)
constexpr int kTiles = 4, kRows = 6;  // 24 of 32 registers hold sums
#elif defined(SPARSEK_ISA_AVX2)
constexpr int kTiles = 1, kRows = 6;  // 12 of 16
#else
constexpr int kTiles = 1, kRows = 3;  // 12 of 16
#endif
static_assert(kRowGroup % kRows == 0 && kPanelTiles % kTiles == 0);
constexpr int kPanelColumns = kPanelTiles * kTileRows;

// One element of x in every lane times kLanes weights; for bfloat16 one pair.
template <class T>
struct Step;
template <>
struct Step<float> {
  using Weights = VecF;
  static constexpr int kDepth = 1;
  static SPARSEK_INLINE Weights weights(const float* p) { return load(p); }
  static SPARSEK_INLINE VecF splat_x(const float* p) { return splat(*p); }
  static SPARSEK_INLINE VecF multiply(VecF sum, VecF x, Weights w) { return sum + x * w; }
};
#if defined(SPARSEK_ISA_AVX512)
template <>
struct Step<BFloat16> {
  using Weights = VecBF;
  static constexpr int kDepth = 2;
  static SPARSEK_INLINE Weights weights(const BFloat16* p) { return load_pairs(p); }
  static SPARSEK_INLINE VecBF splat_x(const BFloat16* p) { return splat_pair(p); }
  static SPARSEK_INLINE VecF multiply(VecF sum, VecBF x, Weights w) { return dot_bf16(sum, w, x); }
};
#endif

// The weights of a panel, or of packed tiles that need no expansion: element (step s, tile t) starts at
// data + s * step_stride + t * tile_stride.
template <class T>
struct Panel {
  const T* data;
  int64_t step_stride, tile_stride, num_steps;
};

// sums[kM][kPanelColumns] (+)= x rows times kN tiles. Not inlined: among a caller's constants g++ 12 runs out of
// registers, and one spilled sum costs a quarter of the speed (620 instead of 880 GF/s on two threads of a Zen 5).
template <class T, int kM, int kN>
__attribute__((noinline)) void multiply_block(const Panel<T>& panel, const T* x, int64_t x_stride, bool add,
                                              float* sums) {
  constexpr int kVecs = kN * kTileVecs;
  VecF sum[kM][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) sum[m][n] = add ? load(sums + m * kPanelColumns + n * kLanes) : VecF{};
  }
  const T* weights = panel.data;
  for (int64_t s = 0; s < panel.num_steps; ++s, weights += panel.step_stride, x += Step<T>::kDepth) {
    typename Step<T>::Weights w[kVecs];
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) {
      w[n] = Step<T>::weights(weights + n / kTileVecs * panel.tile_stride + n % kTileVecs * kLanes * Step<T>::kDepth);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const auto x_m = Step<T>::splat_x(x + m * x_stride);
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) sum[m][n] = Step<T>::multiply(sum[m][n], x_m, w[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) store(sums + m * kPanelColumns + n * kLanes, sum[m][n]);
  }
}

template <class T, int kN>
void multiply_rows(const Panel<T>& panel, const T* x, int64_t x_stride, int64_t rows, bool add, float* sums) {
  switch (rows) {
    case 1:
      return multiply_block<T, 1, kN>(panel, x, x_stride, add, sums);
    case 2:
      return multiply_block<T, 2, kN>(panel, x, x_stride, add, sums);
#if !defined(SPARSEK_ISA_PORTABLE)
    case 3:
      return multiply_block<T, 3, kN>(panel, x, x_stride, add, sums);
    case 4:
      return multiply_block<T, 4, kN>(panel, x, x_stride, add, sums);
    case 5:
      return multiply_block<T, 5, kN>(panel, x, x_stride, add, sums);
#endif
    default:
      return multiply_block<T, kRows, kN>(panel, x, x_stride, add, sums);
  }
}

SPARSEK_INLINE void put(float* panel, int64_t k, int64_t column, VecF even, VecF odd) {
  store(panel + k * kPanelColumns + column, even);
  store(panel + (k + 1) * kPanelColumns + column, odd);
}
#if defined(SPARSEK_ISA_AVX512)
SPARSEK_INLINE void put(BFloat16* panel, int64_t k, int64_t column, VecF even, VecF odd) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(panel + k * kPanelColumns + column * 2,
                      _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
}
#endif

// Depth [k_begin, k_end) of the task's tiles.
template <class T>
Panel<T> make_panel(const PanelTask& task, int64_t k_begin, int64_t k_end) {
  const int64_t num_steps = (k_end - k_begin) / Step<T>::kDepth;
  constexpr WeightType kSameType = Step<T>::kDepth == 2 ? WeightType::kBF16 : WeightType::kF32;
  if (task.weight.type == kSameType) {
    const int64_t tile_elements = packed::depth(task.weight.in_features) * kTileRows;
    const T* data =
        reinterpret_cast<const T*>(task.weight.data) + task.tile_begin * tile_elements + k_begin * kTileRows;
    return {data, kTileRows * Step<T>::kDepth, tile_elements, num_steps};
  }
  T* data = static_cast<T*>(task.panel);
  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    const int64_t first_column = (tile - task.tile_begin) * kTileRows;
    expand(task.weight, tile, k_begin, k_end, [&](int64_t k, int c, int, VecF even, VecF odd) {
      put(data, k - k_begin, first_column + c * kLanes, even, odd);
    });
  }
  return {data, kPanelColumns * Step<T>::kDepth, kTileRows * Step<T>::kDepth, num_steps};
}

template <class T>
void run_panel(const PanelTask& task) {
  const int64_t depth = packed::depth(task.weight.in_features);
  constexpr int64_t kMaxDepth = kPanelBytes / (kPanelColumns * static_cast<int64_t>(sizeof(T)));
  const int64_t num_parts = (depth + kMaxDepth - 1) / kMaxDepth;
  const int64_t part = ((depth + num_parts - 1) / num_parts + packed::kBlock - 1) / packed::kBlock * packed::kBlock;
  const int64_t num_tiles = task.tile_end - task.tile_begin;
  alignas(64) float register_sums[kRows * kPanelColumns];
  for (int64_t k_begin = 0; k_begin < depth; k_begin += part) {
    const int64_t k_end = k_begin + part < depth ? k_begin + part : depth;
    const Panel<T> panel = make_panel<T>(task, k_begin, k_end);
    for (int64_t row = task.row_begin; row < task.row_end; row += kRows) {
      const int64_t rows = row + kRows < task.row_end ? kRows : task.row_end - row;
      const T* x = static_cast<const T*>(task.x.data) + row * task.x.stride + k_begin;
      float* sums = num_parts > 1 ? task.partial + (row - task.row_begin) * kPanelColumns : register_sums;
      if (num_tiles == kTiles) {
        multiply_rows<T, kTiles>(panel, x, task.x.stride, rows, k_begin > 0, sums);
      } else {
        Panel<T> one = panel;
        for (int64_t t = 0; t < num_tiles; ++t, one.data += one.tile_stride) {
          multiply_rows<T, 1>(one, x, task.x.stride, rows, k_begin > 0, sums + t * kTileRows);
        }
      }
      if (k_end < depth) continue;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t t = 0; t < num_tiles; ++t) {
          write_tile(task.output, task.weight.out_features, row + r, task.tile_begin + t,
                     sums + r * kPanelColumns + t * kTileRows);
        }
      }
    }
  }
}

}  // namespace

void linear_panel(const PanelTask& task) {
#if defined(SPARSEK_ISA_AVX512)
  if (task.x.dtype == DType::kBF16) return run_panel<BFloat16>(task);
#endif
  run_panel<float>(task);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
