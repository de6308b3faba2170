#include <cassert>

#include "kernels/cuda/sm90/attention_fwd/describe.cuh"
#include "kernels/cuda/sm90/attention_fwd/launch.h"

namespace sparsek::cuda::sm90 {

int attention_chunk(int group) {
  const int tile = positions_per_tile(group);
  return kChunk / tile * tile;
}

int attention_max_far(int group, bool forward_only) {
  return (forward_only ? kMaxUnionForward : kMaxUnionOthers) / kBlock * kBlock -
         positions_per_tile(group);
}

namespace {
bool serves(const AttentionFwdParams& params, const LiveLists& live, bool forward_only) {
  const int group = params.num_heads / params.num_kv_heads;
  return has_shape(params.dtype, params.head_dim) && group <= 64 &&
         live.max_far <= attention_max_far(group, forward_only);
}
}  // namespace

bool serves_forward(const AttentionFwdParams& params, const LiveLists& live) {
  return serves(params, live, params.q_far == nullptr);
}

bool serves_backward(const AttentionBwdParams& params, const LiveLists& live) {
  return serves(params.fwd, live, false) && !params.deterministic;
}

void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream) {
  assert(serves_forward(params, live) && params.num_heads % params.num_kv_heads == 0);
  const FwdParams p = describe(params, live);
  with_shape(params.dtype, params.head_dim, [&](auto shape) {
    launch_forward<decltype(shape)>(p, stream);
  });
  check_cuda(cudaGetLastError(), "attention_forward");
}

}  // namespace sparsek::cuda::sm90
