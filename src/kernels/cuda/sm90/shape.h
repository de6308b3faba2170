// The element types and head sizes that the Hopper kernels are compiled for: the one place that lists them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>

#include "base/dtype.h"

namespace sparsek::cuda::sm90 {

using Bits16 = uint16_t;  // an element of q, k, v, ..., of either type

constexpr int kTile = 128;   // query rows of a tile
constexpr int kBlock = 128;  // keys of a block

// Tiles lie in shared memory as kPanels panels of [rows, 64] elements, 128-byte swizzled.
template <class Element_, int kHeadDim_>
struct Shape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kRowBytes = 2 * kHeadDim, kPanels = kHeadDim / 64,
                       kPieces = kRowBytes / 16, kTileBytes = kTile * kRowBytes;
};

inline bool has_shape(DType dtype, int head_dim) {
  return (dtype == DType::kBF16 || dtype == DType::kF16) && (head_dim == 64 || head_dim == 128);
}
// f(Shape<...>{}) for one of the shapes that has_shape accepts.
template <class F>
void with_shape(DType dtype, int head_dim, F&& f) {
  assert(has_shape(dtype, head_dim));
  if (dtype == DType::kBF16 && head_dim == 128)
    f(Shape<__nv_bfloat16, 128>{});
  else if (dtype == DType::kBF16)
    f(Shape<__nv_bfloat16, 64>{});
  else if (head_dim == 128)
    f(Shape<__half, 128>{});
  else
    f(Shape<__half, 64>{});
}
// Instantiates a launcher for both types of a head size.
#define SPARSEK_INSTANTIATE(launch, Params, head_dim)                                \
  template void launch<Shape<__nv_bfloat16, head_dim>>(const Params&, cudaStream_t); \
  template void launch<Shape<__half, head_dim>>(const Params&, cudaStream_t)

}  // namespace sparsek::cuda::sm90
