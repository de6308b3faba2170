// The params of _visibility, _chunk_visibility and _window_rows (kernels/params.h), once for torch's tensors (src/ops)
// and the stable ABI's (src/ops/cuda). Checked tensors in, pointers and sizes out; `checked` is the caller's
// checked_int32(name, value).
#pragma once
#include <cstdint>

#include "kernels/params.h"

namespace sparsek::ops {

template <class T, class Tensor>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T, class Tensor>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// expiry, frac_begin and frac_end are contiguous; `outputs` are those of the operation, cu_seqlens null: one document.
template <class Tensor, class Outputs, class Checked>
VisibilityParams visibility_params(DType dtype, const Tensor& scores, const Tensor& tau, const Tensor& expiry,
                                   const Tensor& frac_begin, const Tensor& frac_end, const int32_t* cu_seqlens,
                                   int32_t num_documents, int64_t window_size, int64_t num_sinks,
                                   const Outputs& outputs, Checked checked) {
  const auto& [row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end] = outputs;
  const auto strides = [](const Tensor& tensor) {
    return Strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  };
  VisibilityParams params{};
  params.dtype = dtype;
  params.scores = scores.const_data_ptr();
  params.tau = tau.const_data_ptr();
  params.expiry = input<int32_t>(expiry);
  params.frac_begin = input<int32_t>(frac_begin);
  params.frac_end = input<int32_t>(frac_end);
  params.cu_seqlens = cu_seqlens;
  params.scores_strides = strides(scores);
  params.tau_strides = strides(tau);
  params.index_strides = strides(expiry);
  params.row_scores = row_scores.mutable_data_ptr();
  params.row_tau = row_tau.mutable_data_ptr();
  params.window_begin = output<int32_t>(window_begin);
  params.far_begin = output<int32_t>(far_begin);
  params.far_end = output<int32_t>(far_end);
  params.row_frac_begin = output<int32_t>(row_frac_begin);
  params.row_frac_end = output<int32_t>(row_frac_end);
  params.batch = checked("batch", scores.size(0));
  params.seqlen = checked("seqlen", scores.size(1));
  params.num_kv_heads = checked("num_kv_heads", scores.size(2));
  params.num_documents = num_documents;
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  return params;
}

// All inputs are contiguous.
template <class Tensor, class Outputs, class Checked>
ChunkVisibilityParams chunk_visibility_params(const Tensor& lengths, const Tensor& slot_expiry,
                                              const Tensor& slot_frac_begin, const Tensor& slot_frac_end,
                                              const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                                              const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                                              const Tensor& arrival_frac_end, const Tensor& new_slot_source,
                                              int64_t window_size, int64_t num_sinks, const Outputs& outputs,
                                              Checked checked) {
  const auto& [window_begin, far_begin, far_end, frac_begin, frac_end, is_sink, carried_source, state_source] = outputs;
  ChunkVisibilityParams params{};
  params.lengths = input<int64_t>(lengths);
  params.slot_expiry = input<int32_t>(slot_expiry);
  params.slot_frac_begin = input<int32_t>(slot_frac_begin);
  params.slot_frac_end = input<int32_t>(slot_frac_end);
  params.pool_frac_begin = input<int32_t>(pool_frac_begin);
  params.pool_frac_end = input<int32_t>(pool_frac_end);
  params.arrival_expiry = input<int32_t>(arrival_expiry);
  params.arrival_frac_begin = input<int32_t>(arrival_frac_begin);
  params.arrival_frac_end = input<int32_t>(arrival_frac_end);
  params.new_slot_source = input<int32_t>(new_slot_source);
  params.window_begin = output<int32_t>(window_begin);
  params.far_begin = output<int32_t>(far_begin);
  params.far_end = output<int32_t>(far_end);
  params.frac_begin = output<int32_t>(frac_begin);
  params.frac_end = output<int32_t>(frac_end);
  params.is_sink = output<bool>(is_sink);
  params.carried_source = output<int64_t>(carried_source);
  params.state_source = output<int64_t>(state_source);
  params.batch = checked("batch", arrival_expiry.size(0));
  params.chunk = checked("chunk", arrival_expiry.size(2));
  params.num_kv_heads = checked("num_kv_heads", arrival_expiry.size(1));
  params.topk = checked("topk", new_slot_source.size(2));
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_capacity = checked("pool_capacity", pool_frac_begin.size(2));
  return params;
}

// lengths null: whole sequences.
template <class Tensor, class Outputs, class Checked>
WindowRowsParams window_rows_params(const Tensor& q, const int64_t* lengths, const int32_t* cu_seqlens,
                                    int32_t num_documents, int64_t window_size, int64_t num_sinks,
                                    const Outputs& outputs, Checked checked) {
  const auto& [window_begin, far_begin, far_end, num_queries] = outputs;
  WindowRowsParams params{};
  params.lengths = lengths;
  params.cu_seqlens = cu_seqlens;
  params.window_begin = output<int32_t>(window_begin);
  params.far_begin = output<int32_t>(far_begin);
  params.far_end = output<int32_t>(far_end);
  params.num_queries = output<int32_t>(num_queries);
  params.batch = checked("batch", q.size(0));
  params.seqlen = checked("seqlen", q.size(1));
  params.num_documents = num_documents;
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  return params;
}

}  // namespace sparsek::ops
