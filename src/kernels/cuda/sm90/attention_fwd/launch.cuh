#pragma once
#include "kernels/cuda/sm90/attention_fwd/describe.cuh"
#include "kernels/cuda/sm90/attention_fwd/kernel.cuh"
#include "kernels/cuda/sm90/attention_fwd/launch.h"

namespace sparsek::cuda::sm90 {

template <class ShapeType>
void launch_forward(const FwdParams& p, cudaStream_t stream) {
  const auto launch = [&](auto kernel, size_t shared_bytes) {
    launch_behind(kernel, num_tile_ctas(p), 512, shared_bytes, stream, p);
  };
  if (p.far)
    launch(p.soft ? attention_fwd_kernel<ShapeType, true, true> : attention_fwd_kernel<ShapeType, false, true>,
           sizeof(Shared<ShapeType, true>));
  else
    launch(p.soft ? attention_fwd_kernel<ShapeType, true, false> : attention_fwd_kernel<ShapeType, false, false>,
           sizeof(Shared<ShapeType, false>));
}

}  // namespace sparsek::cuda::sm90
