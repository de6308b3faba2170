// _visibility, _chunk_visibility and _window_rows on the GPU: from a selection to the rows that attention reads.
#include "kernels/cuda/rows/visibility.h"
#include "ops/cuda/checks.h"
#include "ops/row_params.h"

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
  const Tensors7 outputs{values(),  values(), empty({batch, seqlen}, ScalarType::Int, scores), indices(), indices(),
                         indices(), indices()};
  sparsek::cuda::visibility(visibility_params(DType::kF32, scores, tau, ends, begins, frac_ends, documents.cu_seqlens,
                                              documents.count, window_size, num_sinks, outputs, checked_int32),
                            here.stream());
  return outputs;
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
  const Tensors8 outputs{empty({batch, chunk}, ScalarType::Int, lengths),
                         indices(rows),
                         indices(rows),
                         indices(pool + rows),
                         indices(pool + rows),
                         empty({batch, rows}, ScalarType::Bool, lengths),
                         empty({batch, carried, heads}, ScalarType::Long, lengths),
                         empty({batch, heads, carried}, ScalarType::Long, lengths)};
  sparsek::cuda::chunk_visibility(
      chunk_visibility_params(lengths, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end,
                              arrival_expiry, arrival_frac_begin, arrival_frac_end, new_slot_source, window_size,
                              num_sinks, outputs, checked_int32),
      here.stream());
  return outputs;
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
  const Tensors4 outputs{indices(seqlen), indices(rows), indices(rows), indices(given(lengths) ? 0 : seqlen)};
  sparsek::cuda::window_rows(window_rows_params(q, data_or_null<int64_t>(lengths), documents.cu_seqlens,
                                                documents.count, window_size, num_sinks, outputs, checked_int32),
                             here.stream());
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_visibility", TORCH_BOX(&visibility));
  m.impl("_chunk_visibility", TORCH_BOX(&chunk_visibility));
  m.impl("_window_rows", TORCH_BOX(&window_rows));
}

}  // namespace sparsek::ops::cuda
