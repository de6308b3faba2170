// Splits a product over threads and prepares x; the arithmetic is in decode.simd.cc (few rows) and panel.simd.cc.
#include "kernels/cpu/linear/linear.h"

#include <omp.h>

#include <algorithm>
#include <cassert>

#include "base/bf16.h"
#include "kernels/cpu/linear/linear_kernels.h"
#include "kernels/cpu/linear/packed_layout.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch_memory.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr PerIsa<void (*)(const DecodeTask&)> kDecode{&portable::linear_decode, &avx2::linear_decode,
                                                      &avx512::linear_decode};
constexpr PerIsa<void (*)(const PanelTask&)> kPanel{&portable::linear_panel, &avx2::linear_panel,
                                                    &avx512::linear_panel};

// Rows that share one expansion of the weights. More would save nothing measurable and let x leave the caches.
constexpr int64_t kChunkRows = 1024;

thread_local ScratchMemory tls_x, tls_sums, tls_panel, tls_partial;

template <class T>
void copy_row(const T* from, int64_t count, int64_t depth, T* to) {
  std::copy(from, from + count, to);
  if (count < depth) to[count] = T{};
}
void copy_row(const BFloat16* from, int64_t count, int64_t depth, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = to_float(from[k]);
  if (count < depth) to[count] = 0;
}

// Rows [row, row + rows) of x as the kernels want them: as they are if possible, else a copy in this thread's scratch.
LinearInput prepare_x(const LinearParams& params, int64_t row, int64_t rows, bool multiply_bf16) {
  const int64_t in_features = params.weight.in_features, depth = packed::depth(in_features);
  const DType dtype = multiply_bf16 ? DType::kBF16 : DType::kF32;
  const auto* x = static_cast<const uint8_t*>(params.x) +
                  row * params.x_stride * static_cast<int64_t>(size_in_bytes(params.x_dtype));
  if (dtype == params.x_dtype && depth == in_features) return {dtype, x, params.x_stride, rows};
  uint8_t* copy = tls_x.array<uint8_t>(static_cast<size_t>(rows * depth) * size_in_bytes(dtype));
#pragma omp parallel for schedule(static) if (rows > kMaxDecodeRows)
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from_f32 = reinterpret_cast<const float*>(x) + r * params.x_stride;
    const auto* from_bf16 = reinterpret_cast<const BFloat16*>(x) + r * params.x_stride;
    if (multiply_bf16) {
      copy_row(from_bf16, in_features, depth, reinterpret_cast<BFloat16*>(copy) + r * depth);
    } else if (params.x_dtype == DType::kBF16) {
      copy_row(from_bf16, in_features, depth, reinterpret_cast<float*>(copy) + r * depth);
    } else {
      copy_row(from_f32, in_features, depth, reinterpret_cast<float*>(copy) + r * depth);
    }
  }
  return {dtype, copy, depth, rows};
}

// The part of y that belongs to x's rows from `row` on.
LinearOutput output_from(const LinearParams& params, int64_t row) {
  auto* y =
      static_cast<uint8_t*>(params.y) + row * params.y_stride * static_cast<int64_t>(size_in_bytes(params.y_dtype));
  return {y, params.y_dtype, params.y_stride, params.bias, params.add_to_y};
}

void decode(const LinearParams& params) {
  const PackedWeight& weight = params.weight;
  // bfloat16 products want weights that are exact in bfloat16, before their scale.
  const bool multiply_bf16 =
      params.x_dtype == DType::kBF16 && active_isa() == Isa::kAvx512 && weight.type != WeightType::kF32;
  DecodeTask task{weight, prepare_x(params, 0, params.rows, multiply_bf16), output_from(params, 0), nullptr, 0, 0};
  if (multiply_bf16 && weight.type == WeightType::kQ4_1) {
    const int64_t num_blocks = weight.in_features / packed::kBlock;
    float* sums = tls_sums.array<float>(static_cast<size_t>(params.rows * num_blocks));
    for (int64_t r = 0; r < params.rows; ++r) {
      const BFloat16* x = static_cast<const BFloat16*>(task.x.data) + r * task.x.stride;
      for (int64_t block = 0; block < num_blocks; ++block, x += packed::kBlock) {
        float lanes[8] = {};  // eight sums, so that the compiler may use vectors
        for (int k = 0; k < packed::kBlock; ++k) lanes[k % 8] += to_float(x[k]);
        sums[r * num_blocks + block] =
            ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
      }
    }
    task.block_sums = sums;
  }
  const auto kernel = kDecode.active();
  const int64_t num_tiles = packed::num_tiles(weight.out_features);
  FirstError error;
#pragma omp parallel firstprivate(task)
  error.guard([&] {
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    task.tile_begin = num_tiles * thread / num_threads;
    task.tile_end = num_tiles * (thread + 1) / num_threads;
    kernel(task);
  });
  error.rethrow();
}

// One chunk of rows. Work is dealt out in units (panel, group of rows), panel by panel: every thread gets the same
// number of row groups, and only a panel at a boundary between threads is expanded twice.
void multiply_panels(const LinearParams& params, int64_t row, int64_t rows) {
  const bool multiply_bf16 = params.x_dtype == DType::kBF16 && active_isa() == Isa::kAvx512;
  const LinearInput x = prepare_x(params, row, rows, multiply_bf16);
  const auto kernel = kPanel.active();
  const int64_t num_tiles = packed::num_tiles(params.weight.out_features);
  const int64_t num_panels = (num_tiles + kPanelTiles - 1) / kPanelTiles;
  const int64_t num_groups = (rows + kRowGroup - 1) / kRowGroup;
  FirstError error;
#pragma omp parallel
  error.guard([&] {
    const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
    const int64_t end = num_panels * num_groups * (thread + 1) / num_threads;
    PanelTask task{params.weight, x, output_from(params, row), 0, 0, 0, 0, nullptr, nullptr};
    task.panel = tls_panel.array<uint8_t>(kPanelBytes);
    task.partial = tls_partial.array<float>(static_cast<size_t>(kChunkRows * kPanelTiles * packed::kTileRows));
    for (int64_t unit = num_panels * num_groups * thread / num_threads; unit < end;) {
      const int64_t panel = unit / num_groups, group = unit % num_groups;
      const int64_t group_end = std::min(num_groups, group + end - unit);
      task.tile_begin = panel * kPanelTiles;
      task.tile_end = std::min(num_tiles, task.tile_begin + kPanelTiles);
      task.row_begin = group * kRowGroup;
      task.row_end = std::min(rows, group_end * kRowGroup);
      kernel(task);
      unit += group_end - group;
    }
  });
  error.rethrow();
}

}  // namespace

void linear(const LinearParams& params) {
  assert(can_pack(params.weight.type) && params.weight.out_features > 0 && params.weight.in_features > 0);
  assert(reinterpret_cast<uintptr_t>(params.weight.data) % kPackAlignment == 0);
  assert(params.x_dtype == DType::kF32 || params.x_dtype == DType::kBF16);
  assert(params.y_dtype == DType::kF32 || (params.y_dtype == DType::kBF16 && !params.add_to_y));
  if (params.rows <= 0) return;
  if (params.rows <= kMaxDecodeRows) return decode(params);
  for (int64_t row = 0; row < params.rows; row += kChunkRows) {
    multiply_panels(params, row, std::min(kChunkRows, params.rows - row));
  }
}

}  // namespace sparsek::cpu
