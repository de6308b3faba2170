// _visibility, _chunk_visibility and _window_rows on the GPU: from a selection to the rows that attention reads.
#include "kernels/cuda/rows/visibility.h"
#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors7 visibility(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                    const Tensor& frac_end, int64_t window_size, int64_t num_sinks, const MaybeTensor& cu_seqlens) {
  check_scores("scores", scores);
  check_window(window_size, num_sinks);
  const int64_t batch = scores.size(0), seqlen = scores.size(1), heads = scores.size(2);
  const Argument like{"scores", scores, ""};
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType dtype) {
    check_tensor({name, tensor, "[batch, seqlen, num_kv_heads]"}, {batch, seqlen, heads}, dtype, like);
  };
  check("tau", tau, ScalarType::Float);
  check("expiry", expiry, ScalarType::Int);
  check("frac_begin", frac_begin, ScalarType::Int);
  check("frac_end", frac_end, ScalarType::Int);
  const OnDevice here(scores);
  const Documents documents(cu_seqlens, like, batch, seqlen);
  const Tensor ends = as_contiguous(expiry), begins = as_contiguous(frac_begin), frac_ends = as_contiguous(frac_end);
  const auto indices = [&] { return empty({batch, heads, seqlen}, ScalarType::Int, scores); };
  const auto values = [&] { return empty({batch, heads, seqlen}, ScalarType::Float, scores); };
  const Tensor row_scores = values(), row_tau = values(), far_begin = indices(), far_end = indices();
  const Tensor row_frac_begin = indices(), row_frac_end = indices();
  const Tensor window_begin = empty({batch, seqlen}, ScalarType::Int, scores);
  VisibilityParams params{};
  params.dtype = DType::kF32;
  params.scores = scores.const_data_ptr();
  params.tau = tau.const_data_ptr();
  params.expiry = const_data<int32_t>(ends);
  params.frac_begin = const_data<int32_t>(begins);
  params.frac_end = const_data<int32_t>(frac_ends);
  params.cu_seqlens = documents.cu_seqlens;
  params.scores_strides = strides_of(scores);
  params.tau_strides = strides_of(tau);
  params.index_strides = strides_of(ends);
  params.row_scores = row_scores.mutable_data_ptr();
  params.row_tau = row_tau.mutable_data_ptr();
  params.window_begin = data<int32_t>(window_begin);
  params.far_begin = data<int32_t>(far_begin);
  params.far_end = data<int32_t>(far_end);
  params.row_frac_begin = data<int32_t>(row_frac_begin);
  params.row_frac_end = data<int32_t>(row_frac_end);
  params.batch = checked_int32("batch", batch);
  params.seqlen = checked_int32("seqlen", seqlen);
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.num_documents = documents.count;
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  sparsek::cuda::visibility(params, here.stream());
  return {row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end};
}

Tensors8 chunk_visibility(const Tensor& lengths, const Tensor& slot_expiry, const Tensor& slot_frac_begin,
                          const Tensor& slot_frac_end, const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                          const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                          const Tensor& arrival_frac_end, const Tensor& new_slot_source, int64_t window_size,
                          int64_t num_sinks) {
  check_window(window_size, num_sinks);
  check_ndim({"arrival_expiry", arrival_expiry, "[batch, num_kv_heads, chunk]"}, 3);
  check_ndim({"new_slot_source", new_slot_source, "[batch, num_kv_heads, topk]"}, 3);
  check_ndim({"pool_frac_begin", pool_frac_begin, "[batch, num_kv_heads, pool_capacity]"}, 3);
  const int64_t batch = arrival_expiry.size(0), heads = arrival_expiry.size(1), chunk = arrival_expiry.size(2);
  const int64_t topk = new_slot_source.size(2), pool = pool_frac_begin.size(2);
  const int64_t carried = topk + num_sinks + window_size, rows = carried + chunk;
  const Argument like{"arrival_expiry", arrival_expiry, ""};
  check_lanes(like, batch, heads);
  const auto check = [&](const char* name, const Tensor& tensor, int64_t size) {
    const Argument argument{name, tensor, "[batch, num_kv_heads, size]"};
    check_tensor(argument, {batch, heads, size}, ScalarType::Int, like);
    check_contiguous(argument);
  };
  check_tensor({"lengths", lengths, "[batch]"}, {batch}, ScalarType::Long, like);
  check_contiguous({"lengths", lengths, "[batch]"});
  check("slot_expiry", slot_expiry, topk);
  check("slot_frac_begin", slot_frac_begin, topk);
  check("slot_frac_end", slot_frac_end, topk);
  check("pool_frac_begin", pool_frac_begin, pool);
  check("pool_frac_end", pool_frac_end, pool);
  check("arrival_expiry", arrival_expiry, chunk);
  check("arrival_frac_begin", arrival_frac_begin, chunk);
  check("arrival_frac_end", arrival_frac_end, chunk);
  check("new_slot_source", new_slot_source, topk);
  const OnDevice here(lengths);
  const auto indices = [&](int64_t size) { return empty({batch, heads, size}, ScalarType::Int, lengths); };
  const Tensor window_begin = empty({batch, chunk}, ScalarType::Int, lengths);
  const Tensor far_begin = indices(rows), far_end = indices(rows);
  const Tensor frac_begin = indices(pool + rows), frac_end = indices(pool + rows);
  const Tensor is_sink = empty({batch, rows}, ScalarType::Bool, lengths);
  const Tensor carried_source = empty({batch, carried, heads}, ScalarType::Long, lengths);
  const Tensor state_source = empty({batch, heads, carried}, ScalarType::Long, lengths);
  ChunkVisibilityParams params{};
  params.lengths = const_data<int64_t>(lengths);
  params.slot_expiry = const_data<int32_t>(slot_expiry);
  params.slot_frac_begin = const_data<int32_t>(slot_frac_begin);
  params.slot_frac_end = const_data<int32_t>(slot_frac_end);
  params.pool_frac_begin = const_data<int32_t>(pool_frac_begin);
  params.pool_frac_end = const_data<int32_t>(pool_frac_end);
  params.arrival_expiry = const_data<int32_t>(arrival_expiry);
  params.arrival_frac_begin = const_data<int32_t>(arrival_frac_begin);
  params.arrival_frac_end = const_data<int32_t>(arrival_frac_end);
  params.new_slot_source = const_data<int32_t>(new_slot_source);
  params.window_begin = data<int32_t>(window_begin);
  params.far_begin = data<int32_t>(far_begin);
  params.far_end = data<int32_t>(far_end);
  params.frac_begin = data<int32_t>(frac_begin);
  params.frac_end = data<int32_t>(frac_end);
  params.is_sink = data<bool>(is_sink);
  params.carried_source = data<int64_t>(carried_source);
  params.state_source = data<int64_t>(state_source);
  params.batch = checked_int32("batch", batch);
  params.chunk = checked_int32("chunk", chunk);
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.topk = checked_int32("topk", topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_capacity = checked_int32("pool_capacity", pool);
  sparsek::cuda::chunk_visibility(params, here.stream());
  return {window_begin, far_begin, far_end, frac_begin, frac_end, is_sink, carried_source, state_source};
}

Tensors4 window_rows(const Tensor& q, const MaybeTensor& lengths, const MaybeTensor& cu_seqlens, int64_t window_size,
                     int64_t num_sinks) {
  check_window(window_size, num_sinks);
  const Argument like{"q", q, "[batch, seqlen, num_heads, head_dim]"};
  check_ndim(like, 4);
  const int64_t batch = q.size(0), seqlen = q.size(1);
  check_on_gpu(like);
  check_lanes(like, batch, 1);
  if (given(lengths)) {
    check_tensor({"lengths", *lengths, "[batch]"}, {batch}, ScalarType::Long, like);
    check_contiguous({"lengths", *lengths, "[batch]"});
  }
  const OnDevice here(q);
  const Documents documents(cu_seqlens, like, batch, seqlen);
  const int64_t rows = given(lengths) ? num_sinks + window_size + seqlen : seqlen;
  const auto indices = [&](int64_t size) { return empty({batch, size}, ScalarType::Int, q); };
  const Tensor window_begin = indices(seqlen), far_begin = indices(rows), far_end = indices(rows);
  const Tensor num_queries = indices(given(lengths) ? 0 : seqlen);
  WindowRowsParams params{};
  params.lengths = data_or_null<int64_t>(lengths);
  params.cu_seqlens = documents.cu_seqlens;
  params.window_begin = data<int32_t>(window_begin);
  params.far_begin = data<int32_t>(far_begin);
  params.far_end = data<int32_t>(far_end);
  params.num_queries = data<int32_t>(num_queries);
  params.batch = checked_int32("batch", batch);
  params.seqlen = checked_int32("seqlen", seqlen);
  params.num_documents = documents.count;
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  sparsek::cuda::window_rows(params, here.stream());
  return {window_begin, far_begin, far_end, num_queries};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_visibility", TORCH_BOX(&visibility));
  m.impl("_chunk_visibility", TORCH_BOX(&chunk_visibility));
  m.impl("_window_rows", TORCH_BOX(&window_rows));
}

}  // namespace sparsek::ops::cuda
