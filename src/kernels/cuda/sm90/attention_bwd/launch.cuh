#pragma once
#include "kernels/cuda/sm90/attention_bwd/launch.h"
#include "kernels/cuda/sm90/attention_fwd/describe.cuh"

namespace sparsek::cuda::sm90 {

template <class ShapeType>
void launch_prepare(const PrepareParams& p, cudaStream_t stream) {
  const int item_ctas = (p.num_items + 7) / 8;
  launch_behind(prepare_kernel<ShapeType>, p.row_ctas + p.zero_ctas + item_ctas, kPrepareThreads, 0, stream, p);
}

template <class ShapeType>
void launch_dkv(const BwdParams& p, cudaStream_t stream) {
  launch_behind(p.soft ? attention_bwd_kernel<ShapeType, true> : attention_bwd_kernel<ShapeType, false>,
                num_multiprocessors(), 384, sizeof(BwdShared<ShapeType>), stream, p);
}

template <class ShapeType>
void launch_dq(const DqParams& p, cudaStream_t stream) {
  const auto launch = [&](auto kernel, size_t shared_bytes) {
    launch_behind(kernel, num_tile_ctas(p.fwd), 384, shared_bytes, stream, p);
  };
  if (p.fwd.far)
    launch(
        p.fwd.soft ? attention_bwd_dq_kernel<ShapeType, true, true> : attention_bwd_dq_kernel<ShapeType, false, true>,
        sizeof(DqShared<ShapeType, true>));
  else
    launch(
        p.fwd.soft ? attention_bwd_dq_kernel<ShapeType, true, false> : attention_bwd_dq_kernel<ShapeType, false, false>,
        sizeof(DqShared<ShapeType, false>));
}

}  // namespace sparsek::cuda::sm90
