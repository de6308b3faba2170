// _select_chunk on the GPU: eq. 3-6 behind a carried state (eq. 12).
#include "kernels/cuda/select/select_chunk.h"

#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors12 =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors12 select_chunk(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                       const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                       int64_t num_sinks, int64_t pool_size) {
  check_scores("candidate_scores", candidate_scores);
  check_window(window_size, num_sinks);
  check_selection(topk, pool_size);
  const Argument like{"candidate_scores", candidate_scores, ""};
  const int64_t batch = candidate_scores.size(0), chunk = candidate_scores.size(1), heads = candidate_scores.size(2);
  const Argument pool_argument{"pool_scores", pool_scores, "[batch, num_kv_heads, pool_size]"};
  check_ndim(pool_argument, 3);
  const int64_t capacity = pool_size > 0 ? pool_size : pool_scores.size(2);
  const int64_t new_capacity = pool_size > 0 ? pool_size : capacity + chunk;
  check_tensor(pool_argument, {batch, heads, capacity}, ScalarType::Float, like);
  const char* slots_layout = "[batch, num_kv_heads, topk]";
  check_tensor({"slot_scores", slot_scores, slots_layout}, {batch, heads, topk}, ScalarType::Float, like);
  check_tensor({"slot_positions", slot_positions, slots_layout}, {batch, heads, topk}, ScalarType::Long, like);
  check_tensor({"lengths", lengths, "[batch]"}, {batch}, ScalarType::Long, like);
  check_value(capacity >= topk, "pool_scores must hold at least topk = ", topk, " scores, got ", capacity);
  const OnDevice here(candidate_scores);
  const Tensor slots = as_contiguous(slot_scores), positions = as_contiguous(slot_positions);
  const Tensor pool = as_contiguous(pool_scores), tokens = as_contiguous(lengths);
  const auto indices = [&](int64_t size) { return empty({batch, heads, size}, ScalarType::Int, candidate_scores); };
  const Tensor tau = empty({batch, heads, chunk}, ScalarType::Float, candidate_scores);
  const Tensor slot_expiry = indices(topk), slot_frac_begin = indices(topk), slot_frac_end = indices(topk);
  const Tensor pool_frac_begin = indices(capacity), pool_frac_end = indices(capacity);
  const Tensor arrival_expiry = indices(chunk), arrival_frac_begin = indices(chunk), arrival_frac_end = indices(chunk);
  const Tensor new_slot_source = indices(topk);
  const Tensor new_slot_positions = empty({batch, heads, topk}, ScalarType::Long, candidate_scores);
  const Tensor new_pool_source = indices(new_capacity);
  SelectChunkParams params{};
  params.dtype = DType::kF32;
  params.candidate_scores = candidate_scores.const_data_ptr();
  params.slot_scores = slots.const_data_ptr();
  params.slot_positions = const_data<int64_t>(positions);
  params.pool_scores = pool.const_data_ptr();
  params.lengths = const_data<int64_t>(tokens);
  params.tau = tau.mutable_data_ptr();
  params.slot_expiry = data<int32_t>(slot_expiry);
  params.slot_frac_begin = data<int32_t>(slot_frac_begin);
  params.slot_frac_end = data<int32_t>(slot_frac_end);
  params.pool_frac_begin = data<int32_t>(pool_frac_begin);
  params.pool_frac_end = data<int32_t>(pool_frac_end);
  params.arrival_expiry = data<int32_t>(arrival_expiry);
  params.arrival_frac_begin = data<int32_t>(arrival_frac_begin);
  params.arrival_frac_end = data<int32_t>(arrival_frac_end);
  params.new_slot_source = data<int32_t>(new_slot_source);
  params.new_slot_positions = data<int64_t>(new_slot_positions);
  params.new_pool_source = data<int32_t>(new_pool_source);
  params.scores_strides = strides_of(candidate_scores);
  params.tau_strides = {heads * chunk, 1, chunk};
  params.batch = checked_int32("batch", batch);
  params.chunk = checked_int32("chunk", chunk);
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = static_cast<int32_t>(pool_size);
  params.pool_capacity = checked_int32("pool_scores", capacity);
  params.new_pool_capacity = checked_int32("pool_scores", new_capacity);
  const Tensor workspace = here.workspace(sparsek::cuda::select_chunk_workspace_bytes(params));
  sparsek::cuda::select_chunk(params, workspace.mutable_data_ptr(), here.stream());
  return {tau,
          slot_expiry,
          slot_frac_begin,
          slot_frac_end,
          pool_frac_begin,
          pool_frac_end,
          arrival_expiry,
          arrival_frac_begin,
          arrival_frac_end,
          new_slot_source,
          new_slot_positions,
          new_pool_source};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_select_chunk", TORCH_BOX(&select_chunk));
}

}  // namespace sparsek::ops::cuda
