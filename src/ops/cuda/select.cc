// select and _select_rows on the GPU: eq. 3-6.
#include "kernels/cuda/select/select.h"

#include "kernels/cuda/attention.h"
#include "ops/cuda/checks.h"
#include "ops/cuda/far_lists.h"
#include "ops/far_lists.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Shapes and numbers; the outputs are the caller's.
SelectParams describe(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                      std::optional<int64_t> pool_size, const Documents& documents) {
  SelectParams params{};
  params.dtype = DType::kF32;
  params.scores = scores.const_data_ptr();
  params.cu_seqlens = documents.cu_seqlens;
  params.scores_strides = strides_of(scores);
  params.batch = checked_int32("batch", scores.size(0));
  params.seqlen = checked_int32("seqlen", scores.size(1));
  params.num_kv_heads = checked_int32("num_kv_heads", scores.size(2));
  params.num_documents = documents.count;
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = check_selection(topk, pool_size);
  return params;
}

void check(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
           std::optional<int64_t> pool_size) {
  check_scores("scores", scores);
  check_window(window_size, num_sinks);
  check_selection(topk, pool_size);
}

Tensors4 select(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens) {
  check(scores, topk, window_size, num_sinks, pool_size);
  const int64_t batch = scores.size(0), seqlen = scores.size(1), heads = scores.size(2);
  const OnDevice here(scores);
  const Documents documents(cu_seqlens, {"scores", scores, ""}, batch, seqlen);
  const auto indices = [&] { return empty({batch, seqlen, heads}, ScalarType::Int, scores); };
  const Tensor tau = empty({batch, seqlen, heads}, ScalarType::Float, scores), expiry = indices(),
               frac_begin = indices(), frac_end = indices();
  SelectParams params = describe(scores, topk, window_size, num_sinks, pool_size, documents);
  params.tau = tau.mutable_data_ptr();
  params.expiry = data<int32_t>(expiry);
  params.frac_begin = data<int32_t>(frac_begin);
  params.frac_end = data<int32_t>(frac_end);
  params.out_strides = {seqlen * heads, heads, 1};
  const int chunk = sparsek::cuda::attention_chunk(1);
  const Tensor workspace = here.workspace(sparsek::cuda::select_workspace_bytes(params, chunk));
  sparsek::cuda::select(params, {}, chunk, workspace.mutable_data_ptr(), here.stream());
  return {tau, expiry, frac_begin, frac_end};
}

Tensors8 select_rows(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                     std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens, int64_t far_lists_group) {
  check(scores, topk, window_size, num_sinks, pool_size);
  check_value(far_lists_group >= 0 && far_lists_group <= 64, "far_lists_group must be between 0 and 64, got ",
              far_lists_group);
  const int64_t batch = scores.size(0), seqlen = scores.size(1), heads = scores.size(2), lanes = batch * heads;
  const OnDevice here(scores);
  const Documents documents(cu_seqlens, {"scores", scores, ""}, batch, seqlen);
  const auto indices = [&] { return empty({batch, heads, seqlen}, ScalarType::Int, scores); };
  const auto values = [&] { return empty({batch, heads, seqlen}, ScalarType::Float, scores); };
  const Tensor row_scores = values(), tau = values(), window_begin = empty({batch, seqlen}, ScalarType::Int, scores);
  const Tensor far_begin = indices(), far_end = indices(), frac_begin = indices(), frac_end = indices();
  const int64_t max_far = topk + num_sinks;
  const Tensor far_lists =
      empty({far_lists_group > 0 ? far_lists_size(batch, heads, seqlen, max_far) : 0}, ScalarType::Int, scores);

  SelectParams params = describe(scores, topk, window_size, num_sinks, pool_size, documents);
  params.tau = tau.mutable_data_ptr();
  params.frac_begin = data<int32_t>(frac_begin);
  params.frac_end = data<int32_t>(frac_end);
  params.out_strides = {heads * seqlen, 1, seqlen};
  sparsek::cuda::SelectRows rows{};
  rows.row_scores = data<float>(row_scores);
  rows.far_begin = data<int32_t>(far_begin);
  rows.far_end = data<int32_t>(far_end);
  rows.window_begin = data<int32_t>(window_begin);
  const int chunk = sparsek::cuda::attention_chunk(far_lists_group > 0 ? static_cast<int>(far_lists_group) : 1);
  if (far_lists_group > 0) {
    rows.live = FarLists(lanes, seqlen, seqlen, max_far, chunk).in(far_lists);
  }
  // The kernel writes expiry beside far_end, its clipped twin: scratch here.
  const int64_t select_bytes = sparsek::cuda::select_workspace_bytes(params, chunk), expiry_bytes = 4 * lanes * seqlen;
  const Tensor workspace = here.workspace(expiry_bytes + 256 + select_bytes);
  params.expiry = data<int32_t>(workspace);
  sparsek::cuda::select(params, rows, chunk, data<uint8_t>(workspace) + (expiry_bytes + 255) / 256 * 256,
                        here.stream());
  return {row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, far_lists};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("select", TORCH_BOX(&select));
  m.impl("_select_rows", TORCH_BOX(&select_rows));
}

}  // namespace sparsek::ops::cuda
