// From the params struct to what the kernels read: strides, tiles, tensor maps.
#pragma once
#include <algorithm>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/sm90/attention.h"
#include "kernels/cuda/sm90/attention_fwd/tiles.cuh"

namespace sparsek::cuda::sm90 {

// Boxes of `rows` x `heads` x 64 elements of a [batch, seq, heads, head_dim] tensor of 2-byte elements (TMA copies
// bits); dimensions in the order head_dim, heads, seq, batch, or with `rows_first` head_dim, seq, heads, batch.
inline CUtensorMap tensor_map(const void* data, const Strides& strides, int batch, int seqlen, int num_heads,
                              int head_dim, int rows, int heads, bool rows_first) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    return reinterpret_cast<Encode>(function);
  }();
  const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t seq_bytes = strides.seq * sizeof(Bits16), head_bytes = strides.head * sizeof(Bits16),
                   batch_bytes = strides.batch * sizeof(Bits16);
  const cuuint64_t dims[4] = {size(head_dim), size(rows_first ? seqlen : num_heads),
                              size(rows_first ? num_heads : seqlen), size(batch)};
  const cuuint64_t steps[3] = {rows_first ? seq_bytes : head_bytes, rows_first ? head_bytes : seq_bytes, batch_bytes};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows_first ? rows : heads),
                             static_cast<cuuint32_t>(rows_first ? heads : rows), 1},
                   each[4] = {1, 1, 1, 1};
  CUtensorMap map;
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), dims, steps, box, each,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled failed");
  }
  return map;
}

inline int positions_per_tile(int group) {
  return kTile / 2 / group * 2;
}  // twice those of a backward step

inline FwdParams describe(const AttentionFwdParams& params, const LiveLists& live) {
  FwdParams p{};
  const bool far = params.q_far != nullptr;
  p.group = params.num_heads / params.num_kv_heads;
  p.positions_per_tile = positions_per_tile(p.group);
  p.q = static_cast<const Bits16*>(params.q), p.k = static_cast<const Bits16*>(params.k),
  p.v = static_cast<const Bits16*>(params.v);
  p.q_far = far ? static_cast<const Bits16*>(params.q_far) : p.q,
  p.k_far = far ? static_cast<const Bits16*>(params.k_far) : p.k;
  p.scores = static_cast<const float*>(params.scores), p.tau = static_cast<const float*>(params.tau);
  p.window_begin = params.window_begin, p.far_begin = params.far_begin, p.far_end = params.far_end;
  p.out = static_cast<Bits16*>(params.out), p.lse = static_cast<float*>(params.softmax_lse);
  const Strides &q = params.q_strides, &k = params.k_strides, &v = params.v_strides, &o = params.out_strides;
  const Strides &qf = far ? params.q_far_strides : q, &kf = far ? params.k_far_strides : k;
  p.q_batch = q.batch, p.q_seq = q.seq, p.q_head = q.head, p.k_batch = k.batch, p.k_seq = k.seq, p.k_head = k.head;
  p.v_batch = v.batch, p.v_seq = v.seq, p.v_head = v.head, p.o_batch = o.batch, p.o_seq = o.seq, p.o_head = o.head;
  p.qf_batch = qf.batch, p.qf_seq = qf.seq, p.qf_head = qf.head, p.kf_batch = kf.batch, p.kf_seq = kf.seq,
  p.kf_head = kf.head;
  p.batch = params.batch, p.seqlen_q = params.seqlen_q, p.seqlen_k = params.seqlen_k,
  p.num_carried = params.num_carried;
  p.num_heads = params.num_heads, p.num_kv_heads = params.num_kv_heads;
  p.chunk = attention_chunk(p.group);
  p.num_chunks = (p.seqlen_q + p.chunk - 1) / p.chunk;
  p.live = live.rows, p.live_count = live.count, p.live_capacity = live.capacity;
  p.soft = params.gate == Gate::kSoft, p.far = far;
  p.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  p.k_map = tensor_map(p.k, k, p.batch, p.seqlen_k, p.num_kv_heads, params.head_dim, kBlock, 1, true);
  p.v_map = tensor_map(p.v, v, p.batch, p.seqlen_k, p.num_kv_heads, params.head_dim, kBlock, 1, true);
  p.q_map = tensor_map(p.q, q, p.batch, p.seqlen_q, p.num_heads, params.head_dim, p.positions_per_tile, p.group, false);
  p.q_far_map =
      tensor_map(p.q_far, qf, p.batch, p.seqlen_q, p.num_heads, params.head_dim, p.positions_per_tile, p.group, false);
  return p;
}

inline int num_tile_ctas(const FwdParams& p) {
  const int64_t tiles =
      int64_t{(p.seqlen_q + p.positions_per_tile - 1) / p.positions_per_tile} * p.batch * p.num_kv_heads;
  return static_cast<int>(tiles < num_multiprocessors() ? tiles : num_multiprocessors());
}

}  // namespace sparsek::cuda::sm90
