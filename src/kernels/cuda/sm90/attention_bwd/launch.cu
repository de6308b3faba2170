#include "kernels/cuda/sm90/attention_bwd/launch.h"

#include <cassert>

#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/sm90/attention_bwd/around.cuh"
#include "kernels/cuda/sm90/attention_bwd/dq_kernel.cuh"
#include "kernels/cuda/sm90/attention_fwd/describe.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda::sm90 {
namespace {

struct Work {
  RowData* rows;
  Item* items;
  float *lse2, *delta, *dk_scratch, *dv_scratch;
  float* zeroed;  // dq scratch (far rotary), h_key, h_query, counters
  int64_t dq_floats, lane_rows, lane_queries, zeroed_floats;
  void* gradient;
  int steps, far_per_chunk;
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
  const int64_t lanes = int64_t{fwd.batch} * fwd.num_kv_heads;
  work.steps = (fwd.seqlen_q + per_step - 1) / per_step;
  work.far_per_chunk = (live.capacity + kBlock - 1) / kBlock;
  work.lane_rows = lanes * fwd.seqlen_k, work.lane_queries = lanes * fwd.seqlen_q;
  work.dq_floats = fwd.q_far == nullptr ? 0 : lanes * work.steps * kStep * kHeadDim;
  work.zeroed_floats = 2 * work.dq_floats + work.lane_rows + work.lane_queries + 64;
  Carver carver(workspace);
  carver.take(work.rows, lanes * work.steps);
  carver.take(work.items,
              lanes * ((fwd.seqlen_q + chunk - 1) / chunk * work.far_per_chunk + (fwd.seqlen_k + kBlock - 1) / kBlock));
  carver.take(work.lse2, int64_t{fwd.batch} * fwd.num_heads * fwd.seqlen_q);
  carver.take(work.delta, int64_t{fwd.batch} * fwd.num_heads * fwd.seqlen_q);
  carver.take(work.dk_scratch, work.lane_rows * kHeadDim);
  carver.take(work.dv_scratch, work.lane_rows * kHeadDim);
  carver.take(work.zeroed, work.zeroed_floats);
  uint8_t* gradient = nullptr;
  carver.take(gradient, params.dscores == nullptr ? 0 : score_gradient_workspace_bytes(gradient_params(params)));
  work.gradient = gradient;
  return carver.used_bytes();
}

}  // namespace

void launch_bwd(const BwdParams& p, bool soft, cudaStream_t stream) {
  launch_with_shared(soft ? attention_bwd_kernel<true, false, false> : attention_bwd_kernel<false, false, false>,
                     num_multiprocessors(), 384, sizeof(BwdShared), p, stream);
}

int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live) {
  Work work;
  return carve(params, live, nullptr, work);
}

void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream) {
  const AttentionFwdParams& fwd = params.fwd;
  assert(fwd.dtype == DType::kBF16 && fwd.head_dim == kHeadDim && !params.deterministic);
  Work work;
  carve(params, live, workspace, work);
  const FwdParams f = describe(fwd, live);
  const bool far = fwd.q_far != nullptr, soft = fwd.gate == Gate::kSoft;
  const int lanes = fwd.batch * fwd.num_kv_heads;
  const Strides contiguous_q{int64_t{fwd.seqlen_q} * fwd.num_heads * kHeadDim, int64_t{fwd.num_heads} * kHeadDim,
                             kHeadDim};
  const Strides contiguous_k{int64_t{fwd.seqlen_k} * fwd.num_kv_heads * kHeadDim, int64_t{fwd.num_kv_heads} * kHeadDim,
                             kHeadDim};

  BwdParams p{};
  p.positions_per_step = kStep / f.group;
  const auto step_map = [&](const void* x, const Strides& strides) {
    return tensor_map(x, strides, f.batch, f.seqlen_q, f.num_heads, p.positions_per_step, f.group, false);
  };
  p.q_map = step_map(f.q, fwd.q_strides);
  p.q_far_map = step_map(f.q_far, far ? fwd.q_far_strides : fwd.q_strides);
  p.do_map = step_map(params.dout, params.dout_strides);
  p.k_map = f.k_map, p.v_map = f.v_map, p.k_far = f.k_far, p.v = f.v;
  p.rows = work.rows, p.items = work.items;
  p.dq = work.zeroed, p.dq_far = work.zeroed + work.dq_floats;
  float* const h_key = work.zeroed + 2 * work.dq_floats;
  float* const h_query = h_key + work.lane_rows;
  p.h_key = params.dscores == nullptr ? nullptr : h_key, p.h_query = h_query;
  p.next_item = reinterpret_cast<int32_t*>(h_query + work.lane_queries), p.far_done = p.next_item + 1;
  p.far_begin = f.far_begin, p.far_end = f.far_end, p.live = f.live;
  p.dk_scratch = work.dk_scratch, p.dv_scratch = work.dv_scratch;
  p.dk = static_cast<bf16*>(params.dk), p.dk_far = static_cast<bf16*>(params.dk_far),
  p.dv = static_cast<bf16*>(params.dv);
  p.kf_batch = f.kf_batch, p.kf_seq = f.kf_seq, p.kf_head = f.kf_head, p.v_batch = f.v_batch, p.v_seq = f.v_seq,
  p.v_head = f.v_head;
  p.dk_batch = p.dkf_batch = p.dv_batch = contiguous_k.batch, p.dk_seq = p.dkf_seq = p.dv_seq = contiguous_k.seq,
  p.dk_head = p.dkf_head = p.dv_head = kHeadDim;
  p.seqlen_q = f.seqlen_q, p.seqlen_k = f.seqlen_k, p.num_carried = f.num_carried, p.num_kv_heads = f.num_kv_heads;
  p.group = f.group, p.group_inverse = (65536 + f.group - 1) / f.group, p.steps = work.steps;
  p.num_chunks = f.num_chunks, p.live_capacity = f.live_capacity, p.scale = static_cast<float>(fwd.softmax_scale),
  p.scale_log2 = f.scale_log2;
  const int band_items = (f.seqlen_k + kBlock - 1) / kBlock * lanes;
  p.num_items = f.num_chunks * lanes * work.far_per_chunk + band_items;

  check_cuda(cudaMemsetAsync(work.zeroed, 0, work.zeroed_floats * sizeof(float), stream), "cudaMemsetAsync");
  bwd_zero_kernel<<<(work.lane_rows + 255) / 256, 256, 0, stream>>>(f.far_begin, f.far_end, work.lane_rows,
                                                                    work.dk_scratch, work.dv_scratch);
  // out and dout are read with the same strides.
  assert(params.dout_strides.batch == f.o_batch && params.dout_strides.seq == f.o_seq &&
         params.dout_strides.head == f.o_head);
  bwd_rows_kernel<<<dim3(work.steps, lanes), 256, 0, stream>>>(
      f.out, static_cast<const bf16*>(params.dout), f.lse, static_cast<const float*>(params.dlse), f.tau,
      f.window_begin, f.seqlen_q, f.num_heads, f.num_kv_heads, p.positions_per_step, work.steps, f.o_batch, f.o_seq,
      f.o_head, work.rows, work.lse2, work.delta);
  bwd_items_kernel<<<(p.num_items + 7) / 8, 256, 0, stream>>>(
      f.window_begin, f.live, f.live_count, live.classes, lanes, f.num_kv_heads, f.seqlen_q, f.seqlen_k, f.num_carried,
      f.num_chunks, f.chunk, f.live_capacity, p.positions_per_step, work.far_per_chunk, work.items);
  if (far) {
    launch_bwd_far(p, soft, stream);
    const int64_t threads = work.dq_floats / 16;
    for (const bool second : {false, true}) {
      bwd_dq_kernel<<<(threads + 255) / 256, 256, 0, stream>>>(
          second ? p.dq_far : p.dq, f.seqlen_q, f.num_kv_heads, f.group, p.positions_per_step, work.steps, threads,
          p.scale, contiguous_q.batch, contiguous_q.seq, contiguous_q.head,
          static_cast<bf16*>(second ? params.dq_far : params.dq));
    }
  } else {
    launch_bwd(p, soft, stream);
    DqParams d{};
    d.fwd = f;
    d.do_map = tensor_map(params.dout, params.dout_strides, f.batch, f.seqlen_q, f.num_heads, f.positions_per_tile,
                          f.group, false);
    d.lse2 = work.lse2, d.delta = work.delta, d.dq = static_cast<bf16*>(params.dq),
    d.h_query = p.h_key == nullptr ? nullptr : h_query;
    d.dq_batch = contiguous_q.batch, d.dq_seq = contiguous_q.seq, d.dq_head = contiguous_q.head, d.scale = p.scale;
    launch_with_shared(soft ? attention_bwd_dq_kernel<true> : attention_bwd_dq_kernel<false>, num_tile_ctas(f), 384,
                       sizeof(DqShared), d, stream);
  }
  if (params.dscores != nullptr) {
    ScoreGradientParams gradient = gradient_params(params);
    gradient.h_key = h_key, gradient.h_query = h_query;
    score_gradient(gradient, work.gradient, stream);
  }
  check_cuda(cudaGetLastError(), "attention_backward");
}

}  // namespace sparsek::cuda::sm90
