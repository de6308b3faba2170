// What linear.cc hands to one thread: a range of tiles against rows of x. Compiled per instruction set.
#pragma once
#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/linear/linear.h"

namespace sparsek::cpu {

// x as the kernels read it: rows stride elements apart, zero up to packed::depth. AVX-512 multiplies bfloat16 as it is;
// other sets are given x converted to float32.
struct LinearInput {
  DType dtype;
  const void* data;
  int64_t stride;
  int64_t rows;
};

// Where results go: y, bias and their types from the call, with y already advanced to the first of the input's rows.
struct LinearOutput {
  void* y;
  DType dtype;
  int64_t stride;
  const float* bias;
  bool add_to_y;
};

// All rows of x (at most kMaxDecodeRows) against tiles [tile_begin, tile_end).
struct DecodeTask {
  PackedWeight weight;
  LinearInput x;
  LinearOutput output;
  const float* block_sums;  // [rows][in_features / 32] sums of x; read for Q4_1 with bfloat16 x
  int64_t tile_begin, tile_end;
};

// Rows [row_begin, row_end) of x against at most kPanelTiles tiles.
struct PanelTask {
  PackedWeight weight;
  LinearInput x;
  LinearOutput output;
  int64_t tile_begin, tile_end;
  int64_t row_begin, row_end;
  void* panel;     // kPanelBytes, aligned to 64
  float* partial;  // [row_end - row_begin][kPanelTiles * 16], used when the depth needs more than one panel
};

inline constexpr int kPanelTiles = 4;
inline constexpr int kPanelBytes = 256 * 1024;  // a quarter of a typical second-level cache
inline constexpr int kRowGroup = 6;             // rows that a kernel holds in registers; row ranges start at multiples

#define SPARSEK_DECLARE_LINEAR_KERNELS(isa)   \
  namespace isa {                             \
  void linear_decode(const DecodeTask& task); \
  void linear_panel(const PanelTask& task);   \
  }
SPARSEK_DECLARE_LINEAR_KERNELS(portable)
SPARSEK_DECLARE_LINEAR_KERNELS(avx2)
SPARSEK_DECLARE_LINEAR_KERNELS(avx512)
#undef SPARSEK_DECLARE_LINEAR_KERNELS

}  // namespace sparsek::cpu
