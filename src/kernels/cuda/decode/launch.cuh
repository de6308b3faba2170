// The two launches of a decode step; instantiated by launch_64.cu and launch_128.cu, which compile side by side.
#pragma once
#include "kernels/cuda/decode/apply.cuh"
#include "kernels/cuda/decode/attend.cuh"
#include "kernels/cuda/decode/launches.h"

namespace sparsek::cuda::decode {

template <class Element, int kDim, int kHeadTiles>
void launch_kernels(const Problem& p, cudaStream_t stream) {
  const int64_t ctas = int64_t{p.units()} * p.num_splits * p.head_parts;
  attend_kernel<Element, kDim, kHeadTiles><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "decode_step");
  launch_behind(apply_kernel<Element, kDim>, static_cast<unsigned>(2 * p.units()), kApplyThreads, 0, stream, p);
}

template <int kDim>
void launch(const Problem& p, cudaStream_t stream) {
  const bool is_half = p.params.dtype == DType::kF16;
  if (p.group <= kHeadTile) {
    is_half ? launch_kernels<__half, kDim, 1>(p, stream) : launch_kernels<__nv_bfloat16, kDim, 1>(p, stream);
  } else {
    is_half ? launch_kernels<__half, kDim, 2>(p, stream) : launch_kernels<__nv_bfloat16, kDim, 2>(p, stream);
  }
}

}  // namespace sparsek::cuda::decode
