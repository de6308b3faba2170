#include <cassert>

#include "kernels/cuda/sm90/attention_fwd/describe.cuh"

namespace sparsek::cuda::sm90 {

int attention_chunk(int group) {
  const int tile = positions_per_tile(group);
  return kChunk / tile * tile;
}

int attention_max_far(int group, bool forward_only) {
  return (forward_only ? Shared<false>::kMaxUnion : Shared<true>::kMaxUnion) / kBlock * kBlock -
         positions_per_tile(group);
}

namespace {
bool serves(const AttentionFwdParams& params, const LiveLists& live, bool forward_only) {
  const int group = params.num_heads / params.num_kv_heads;
  return params.dtype == DType::kBF16 && params.head_dim == kHeadDim && group <= 64 &&
         live.max_far <= attention_max_far(group, forward_only);
}
}  // namespace

bool serves_forward(const AttentionFwdParams& params, const LiveLists& live) {
  return serves(params, live, params.q_far == nullptr);
}

bool serves_backward(const AttentionBwdParams& params, const LiveLists& live) {
  const Strides &out = params.fwd.out_strides, &dout = params.dout_strides;
  return serves(params.fwd, live, false) && !params.deterministic && out.batch == dout.batch && out.seq == dout.seq &&
         out.head == dout.head;
}

void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream) {
  assert(params.dtype == DType::kBF16 && params.head_dim == kHeadDim && params.num_heads % params.num_kv_heads == 0);
  const FwdParams p = describe(params, live);
  const auto launch = [&](auto kernel, size_t shared_bytes) {
    launch_with_shared(kernel, num_tile_ctas(p), 512, shared_bytes, p, stream);
  };
  const bool soft = params.gate == Gate::kSoft;
  if (params.q_far != nullptr) {
    launch(soft ? attention_fwd_kernel<true, true> : attention_fwd_kernel<false, true>, sizeof(Shared<true>));
  } else {
    launch(soft ? attention_fwd_kernel<true, false> : attention_fwd_kernel<false, false>, sizeof(Shared<false>));
  }
  check_cuda(cudaGetLastError(), "attention_forward");
}

}  // namespace sparsek::cuda::sm90
