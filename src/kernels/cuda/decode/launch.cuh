// The two launches of a decode step; instantiated by launch_64.cu and launch_128.cu, which compile side by side.
#pragma once
#include "kernels/cuda/decode/apply.cuh"
#include "kernels/cuda/decode/attend.cuh"
#include "kernels/cuda/decode/launches.h"
#include "kernels/cuda/launch.h"

namespace sparsek::cuda::decode {

// The second launch may begin early only where its code waits for the first (compute capability 9.0 code).
template <class Kernel>
bool waits_by_itself(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

template <class Element, int kDim, int kHeadTiles>
void launch_kernels(const Problem& p, cudaStream_t stream) {
  const int64_t ctas = int64_t{p.units()} * p.num_splits * p.head_parts;
  attend_kernel<Element, kDim, kHeadTiles><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "decode_step");
  static const bool early = waits_by_itself(apply_kernel<Element, kDim>);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(2 * p.units());
  config.blockDim = kApplyThreads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, apply_kernel<Element, kDim>, p), "decode_step");
}

template <int kDim>
void launch(const Problem& p, cudaStream_t stream) {
  const bool is_half = p.params.dtype == DType::kF16;
  if (p.group <= kHeadTile) {
    is_half ? launch_kernels<Fp16, kDim, 1>(p, stream) : launch_kernels<Bf16, kDim, 1>(p, stream);
  } else {
    is_half ? launch_kernels<Fp16, kDim, 2>(p, stream) : launch_kernels<Bf16, kDim, 2>(p, stream);
  }
}

}  // namespace sparsek::cuda::decode
