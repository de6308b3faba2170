#include "kernels/cuda/sm90/attention_bwd/launch.h"
#include "kernels/cuda/sm90/attention_fwd/describe.cuh"

namespace sparsek::cuda::sm90 {

void launch_bwd_far(const BwdParams& p, bool soft, cudaStream_t stream) {
  launch_with_shared(soft ? attention_bwd_kernel<true, true, true> : attention_bwd_kernel<false, true, true>,
                     num_multiprocessors(), 384, sizeof(BwdShared), p, stream);
}

}  // namespace sparsek::cuda::sm90
