#include "kernels/cuda/sm90/attention_bwd/launch.h"

#include <cassert>

#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/sm90/attention_fwd/describe.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda::sm90 {
namespace {

struct Work {
  RowData* rows;
  Item* items;
  float *lse2, *delta, *dk_scratch, *dv_scratch, *h_key, *h_query;
  int32_t* counters;
  void* gradient;
  int64_t lane_rows;
  int lanes, steps, num_chunks, far_per_chunk, num_items;
};

ScoreGradientParams gradient_params(const AttentionBwdParams& params) {
  const AttentionFwdParams& fwd = params.fwd;
  return {nullptr,
          nullptr,
          params.frac_begin,
          params.frac_end,
          static_cast<float*>(params.dscores),
          fwd.batch * fwd.num_kv_heads,
          fwd.seqlen_q,
          fwd.seqlen_k,
          params.num_pool_rows};
}

int64_t carve(const AttentionBwdParams& params, const LiveLists& live, void* workspace, Work& work) {
  const AttentionFwdParams& fwd = params.fwd;
  const int group = fwd.num_heads / fwd.num_kv_heads, per_step = kStep / group, chunk = attention_chunk(group);
  const bool scored = params.dscores != nullptr;
  work.lanes = fwd.batch * fwd.num_kv_heads;
  work.steps = (fwd.seqlen_q + per_step - 1) / per_step;
  work.num_chunks = (fwd.seqlen_q + chunk - 1) / chunk;
  work.far_per_chunk = (live.capacity + kBlock - 1) / kBlock;
  work.num_items = work.lanes * (work.num_chunks * work.far_per_chunk + (fwd.seqlen_k + kBlock - 1) / kBlock);
  work.lane_rows = int64_t{work.lanes} * fwd.seqlen_k;
  Carver carver(workspace);
  carver.take(work.rows, int64_t{work.lanes} * work.steps);
  carver.take(work.items, work.num_items);
  carver.take(work.lse2, int64_t{fwd.batch} * fwd.num_heads * fwd.seqlen_q);
  carver.take(work.delta, int64_t{fwd.batch} * fwd.num_heads * fwd.seqlen_q);
  carver.take(work.dk_scratch, work.lane_rows * fwd.head_dim);
  carver.take(work.dv_scratch, work.lane_rows * fwd.head_dim);
  carver.take(work.h_key, scored ? work.lane_rows : 0);
  carver.take(work.h_query, scored ? int64_t{work.lanes} * fwd.seqlen_q : 0);
  carver.take(work.counters, 2);
  uint8_t* gradient = nullptr;
  carver.take(gradient, scored ? score_gradient_workspace_bytes(gradient_params(params)) : 0);
  work.gradient = gradient;
  if (!scored) work.h_key = work.h_query = nullptr;
  return carver.used_bytes();
}

PrepareParams describe_prepare(const AttentionBwdParams& params, const LiveLists& live, const FwdParams& f,
                               const Work& work) {
  PrepareParams p{};
  p.out = f.out, p.d_out = static_cast<const Bits16*>(params.dout);
  p.lse = f.lse, p.d_lse = static_cast<const float*>(params.dlse), p.tau = f.tau;
  p.window_begin = f.window_begin, p.far_begin = f.far_begin, p.far_end = f.far_end;
  p.live = live;
  p.rows = work.rows, p.lse2 = work.lse2, p.delta = work.delta, p.dk_scratch = work.dk_scratch,
  p.dv_scratch = work.dv_scratch, p.h_key = work.h_key, p.h_query = work.h_query, p.items = work.items,
  p.counters = work.counters;
  p.o_batch = f.o_batch, p.o_seq = f.o_seq, p.o_head = f.o_head;
  p.do_batch = params.dout_strides.batch, p.do_seq = params.dout_strides.seq, p.do_head = params.dout_strides.head;
  p.lanes = work.lanes, p.num_heads = f.num_heads, p.num_kv_heads = f.num_kv_heads, p.seqlen_q = f.seqlen_q,
  p.seqlen_k = f.seqlen_k, p.num_carried = f.num_carried;
  p.positions_per_step = kStep / f.group, p.steps = work.steps, p.num_chunks = f.num_chunks, p.chunk = f.chunk,
  p.far_per_chunk = work.far_per_chunk, p.num_items = work.num_items;
  p.row_ctas = work.steps * work.lanes, p.zero_ctas = static_cast<int32_t>((work.lane_rows + 255) / 256);
  return p;
}

BwdParams describe_dkv(const AttentionBwdParams& params, const FwdParams& f, const Work& work) {
  const AttentionFwdParams& fwd = params.fwd;
  const bool far = fwd.q_far != nullptr;
  BwdParams p{};
  p.positions_per_step = kStep / f.group;
  const auto step_map = [&](const void* x, const Strides& strides) {
    return tensor_map(x, strides, f.batch, f.seqlen_q, f.num_heads, fwd.head_dim, p.positions_per_step, f.group, false);
  };
  p.q_map = step_map(f.q, fwd.q_strides);
  p.q_far_map = step_map(f.q_far, far ? fwd.q_far_strides : fwd.q_strides);
  p.do_map = step_map(params.dout, params.dout_strides);
  p.k_map = f.k_map, p.v_map = f.v_map, p.k_far = f.k_far, p.v = f.v;
  p.rows = work.rows, p.items = work.items;
  p.h_key = work.h_key;
  p.next_item = work.counters, p.far_done = work.counters + 1;
  p.far_begin = f.far_begin, p.far_end = f.far_end, p.live = f.live;
  p.dk_scratch = work.dk_scratch, p.dv_scratch = work.dv_scratch;
  p.dk = static_cast<Bits16*>(params.dk), p.dv = static_cast<Bits16*>(params.dv);
  p.dk_far = far ? static_cast<Bits16*>(params.dk_far) : nullptr;
  p.kf_batch = f.kf_batch, p.kf_seq = f.kf_seq, p.kf_head = f.kf_head, p.v_batch = f.v_batch, p.v_seq = f.v_seq,
  p.v_head = f.v_head;
  p.dk_head = fwd.head_dim, p.dk_seq = int64_t{fwd.num_kv_heads} * fwd.head_dim, p.dk_batch = fwd.seqlen_k * p.dk_seq;
  p.seqlen_q = f.seqlen_q, p.seqlen_k = f.seqlen_k, p.num_carried = f.num_carried, p.num_kv_heads = f.num_kv_heads;
  p.group = f.group, p.group_inverse = (65536 + f.group - 1) / f.group, p.steps = work.steps;
  p.num_items = work.num_items, p.scale = static_cast<float>(fwd.softmax_scale), p.scale_log2 = f.scale_log2;
  p.soft = f.soft;
  return p;
}

DqParams describe_dq(const AttentionBwdParams& params, const FwdParams& f, const Work& work) {
  const AttentionFwdParams& fwd = params.fwd;
  DqParams p{};
  p.fwd = f;
  p.do_map = tensor_map(params.dout, params.dout_strides, f.batch, f.seqlen_q, f.num_heads, fwd.head_dim,
                        f.positions_per_tile, f.group, false);
  p.lse2 = work.lse2, p.delta = work.delta, p.h_query = work.h_query;
  p.dq = static_cast<Bits16*>(params.dq), p.dq_far = static_cast<Bits16*>(params.dq_far);
  p.dq_head = fwd.head_dim, p.dq_seq = int64_t{fwd.num_heads} * fwd.head_dim, p.dq_batch = fwd.seqlen_q * p.dq_seq;
  p.scale = static_cast<float>(fwd.softmax_scale);
  return p;
}

}  // namespace

int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live) {
  Work work;
  return carve(params, live, nullptr, work);
}

void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream) {
  assert(serves_backward(params, live));
  Work work;
  carve(params, live, workspace, work);
  const FwdParams f = describe(params.fwd, live);
  const PrepareParams prepare = describe_prepare(params, live, f, work);
  const BwdParams dkv = describe_dkv(params, f, work);
  const DqParams dq = describe_dq(params, f, work);
  with_shape(params.fwd.dtype, params.fwd.head_dim, [&](auto shape) {
    using ShapeType = decltype(shape);
    launch_prepare<ShapeType>(prepare, stream);
    launch_dkv<ShapeType>(dkv, stream);
    launch_dq<ShapeType>(dq, stream);
  });
  if (params.dscores != nullptr) {
    ScoreGradientParams gradient = gradient_params(params);
    gradient.h_key = work.h_key, gradient.h_query = work.h_query;
    score_gradient(gradient, work.gradient, stream);
  }
  check_cuda(cudaGetLastError(), "attention_backward");
}

}  // namespace sparsek::cuda::sm90
