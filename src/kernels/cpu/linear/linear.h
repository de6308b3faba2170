// Matrix products with model weights on the CPU, y[rows, out] = x[rows, in] W[out, in]^T (+ bias) (+ y), and rows of W.
//
// Weights stay in their quantised form, repacked once at load (pack_rows) so that 16 output rows lie in the 16 lanes of
// a vector; the packed buffer has the size of the original within the rounding of `out` to 16. Nothing is ever
// dequantised whole: few rows (decode) read each packed byte once, many rows (prefill) expand one block of columns at a
// time into a cache-sized panel. Several matrices with the same `in` and type can be stacked into one packed weight
// (q, k, v; gate, up): pack_rows is called once per matrix, and y then holds their outputs side by side.
//
// x decides the arithmetic; sums are always float32:
//   x kF32   the weight's values in float32.
//   x kBF16  AVX-512 with more than kMaxDecodeRows rows: the weight's values rounded to bfloat16. Otherwise unrounded
//            values (other instruction sets convert x to float32).
// It does not check anything: sizes and types are asserted. The caller re-encodes types other than those of
// can_pack with quantise_q8_0. Many packed weights are best kept in one mapping with madvise(MADV_HUGEPAGE): decode
// reads all of them for every token (about 3 % faster).
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/quant.h"

namespace sparsek::cpu {

inline constexpr int kPackAlignment = 64;  // of packed buffers, in bytes
inline constexpr int kMaxDecodeRows = 8;   // this many rows of x go through the bandwidth-bound path

// F32, BF16, Q4_1 and Q8_0. in_features is a multiple of the type's block; out_features is anything >= 1.
constexpr bool can_pack(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kBF16 || type == WeightType::kQ4_1 ||
         type == WeightType::kQ8_0;
}
size_t packed_size_bytes(WeightType type, int64_t out_features, int64_t in_features);

// Writes `count` rows, given as GGUF blocks row after row, as output rows [row_begin, row_begin + count) of a packed
// weight of that whole size. Rows may come in any order and number of calls; each must come once. `packed` needs no
// initialisation.
void pack_rows(WeightType type, int64_t out_features, int64_t in_features, int64_t row_begin, int64_t count,
               const uint8_t* blocks, uint8_t* packed);

struct PackedWeight {
  WeightType type;
  int64_t out_features, in_features;
  const uint8_t* data;  // packed_size_bytes, aligned to kPackAlignment; not owned
};

// One row of W (a token's embedding) as float32: exactly what dequantise gives for the row's blocks.
void dequantise_row(const PackedWeight& weight, int64_t row, float* out);

struct LinearParams {
  PackedWeight weight;
  DType x_dtype = DType::kBF16;  // kBF16 or kF32
  DType y_dtype = DType::kF32;   // kBF16 or kF32
  const void* x = nullptr;       // [rows, in_features], rows x_stride elements apart
  void* y = nullptr;             // [rows, out_features], rows y_stride elements apart; does not overlap x
  const float* bias = nullptr;   // [out_features] or null
  int64_t rows = 0;
  int64_t x_stride = 0, y_stride = 0;
  bool add_to_y = false;  // y += instead of y = (a residual); y_dtype kF32 only
};

// Runs on omp_get_max_threads() threads. Results do not depend on the number of threads, nor a row's on its neighbours
// as long as `rows` stays on the same side of kMaxDecodeRows.
void linear(const LinearParams& params);

}  // namespace sparsek::cpu
