#include "kernels/cuda/portable/attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/portable/attention_bwd/around.h"
#include "kernels/cuda/portable/problem.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda::portable {
namespace {

void describe(const AttentionFwdParams& params, const LiveLists& live, Problem& p) {
  p.fwd = params, p.live = live;
  p.group = params.num_heads / params.num_kv_heads;
  p.positions_per_step = 64 / p.group;
  p.group_inverse = static_cast<uint32_t>((65536 + p.group - 1) / p.group);
  p.chunk = attention_chunk(p.group);
  p.num_chunks = (params.seqlen_q + p.chunk - 1) / p.chunk;
  p.scale = static_cast<float>(params.softmax_scale);
  p.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  assert(serves(params.dtype, params.head_dim, p.group) && p.chunk % p.positions_per_step == 0);
  for ([[maybe_unused]] const Strides* strides : {&params.k_strides, &params.v_strides, &params.k_far_strides})
    assert(strides->seq >= 0 && strides->seq < int64_t{1} << 31);  // tile.cuh: a row's stride in bytes is 32 bits
}

ScoreGradientParams gradient_params(const AttentionBwdParams& params) {
  ScoreGradientParams gradient{};
  gradient.frac_begin = params.frac_begin, gradient.frac_end = params.frac_end;
  gradient.dscores = static_cast<float*>(params.dscores);
  gradient.lanes = params.fwd.batch * params.fwd.num_kv_heads;
  gradient.seqlen_q = params.fwd.seqlen_q, gradient.seqlen_k = params.fwd.seqlen_k;
  gradient.num_pool_rows = params.num_pool_rows;
  return gradient;
}

struct Work {
  BwdProblem problem;
  int32_t *blocks_before, *counters;
  uint8_t* gradient;
  int64_t num_counters;  // zeroed, with the h_key behind them
};

int64_t carve(const AttentionBwdParams& params, const LiveLists& live, void* workspace, Work& work) {
  BwdProblem& p = work.problem;
  const AttentionFwdParams& fwd = params.fwd;
  describe(fwd, live, p);
  const bool has_scores = params.dscores != nullptr;
  const int64_t lanes = int64_t{fwd.batch} * fwd.num_kv_heads, rows = lanes * fwd.seqlen_k,
                query_rows = int64_t{fwd.batch} * fwd.num_heads * fwd.seqlen_q;
  p.blocks_per_list = (live.capacity + 63) / 64;
  Carver carver(workspace);
  carver.take(p.lse2, query_rows), carver.take(p.delta, query_rows);
  carver.take(p.dk_sum, rows * fwd.head_dim), carver.take(p.dv_sum, rows * fwd.head_dim);
  carver.take(work.blocks_before, lanes * (p.num_chunks + 1));
  carver.take(p.h_query, has_scores ? lanes * fwd.seqlen_q : 0);
  work.num_counters = lanes + 1 + (has_scores ? rows : 0);
  carver.take(work.counters, work.num_counters);
  carver.take(work.gradient, has_scores ? score_gradient_workspace_bytes(gradient_params(params)) : 0);
  p.next_item = work.counters, p.blocks_done = work.counters + 1;
  p.h_key = has_scores ? reinterpret_cast<float*>(work.counters + 1 + lanes) : nullptr;
  if (!has_scores) p.h_query = nullptr;
  p.blocks_before = work.blocks_before;
  p.dout = params.dout, p.dout_strides = params.dout_strides;
  p.dq = params.dq, p.dk = params.dk, p.dv = params.dv, p.dq_far = params.dq_far, p.dk_far = params.dk_far;
  return carver.used_bytes();
}

}  // namespace

bool serves(DType dtype, int head_dim, int group) {
  return (dtype == DType::kBF16 || dtype == DType::kF16) && (head_dim == 64 || head_dim == 128) && group <= 64;
}

void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream) {
  Problem problem{};
  describe(params, live, problem);
  if (params.dtype == DType::kBF16)
    launch_forward<__nv_bfloat16>(problem, stream);
  else
    launch_forward<__half>(problem, stream);
  check_cuda(cudaGetLastError(), "attention_forward");
}

int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live) {
  Work work{};
  return carve(params, live, nullptr, work);
}

void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream) {
  Work work{};
  carve(params, live, workspace, work);
  const BwdProblem& p = work.problem;
  check_cuda(cudaMemsetAsync(work.counters, 0, work.num_counters * sizeof(int32_t), stream), "cudaMemsetAsync");
  launch_around(p, static_cast<const float*>(params.dlse), work.blocks_before, stream);
  if (params.fwd.dtype == DType::kBF16) {
    launch_key_gradient<__nv_bfloat16>(p, stream);
    launch_query_gradient<__nv_bfloat16>(p, stream);
  } else {
    launch_key_gradient<__half>(p, stream);
    launch_query_gradient<__half>(p, stream);
  }
  if (params.dscores != nullptr) {
    ScoreGradientParams gradient = gradient_params(params);
    gradient.h_key = p.h_key, gradient.h_query = p.h_query;
    score_gradient(gradient, work.gradient, stream);
  }
  check_cuda(cudaGetLastError(), "attention_backward");
}

}  // namespace sparsek::cuda::portable
