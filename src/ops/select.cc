// select and _select_chunk: eq. 3-6, for whole sequences and behind a carried state. No gradient: which keys are
// selected is constant (section 5).
#include "kernels/cpu/select/select.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

void check(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks, std::optional<int64_t> pool_size,
           const MaybeTensor& cu_seqlens) {
  check_scores("scores", scores);
  check_cu_seqlens(cu_seqlens, "scores", scores);
  check_window(window_size, num_sinks);
  check_selection(topk, pool_size);
}

Tensors4 allocate(const Tensor& scores) {
  const auto sizes = scores.sym_sizes();
  const auto indices = [&] { return int32_of({sizes[0], sizes[1], sizes[2]}, scores); };
  return {empty_of({sizes[0], sizes[1], sizes[2]}, scores.options()), indices(), indices(), indices()};
}

Tensors4 select_meta(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                     std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens) {
  check(scores, topk, window_size, num_sinks, pool_size, cu_seqlens);
  return allocate(scores);
}

Tensors4 select_cpu(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                    std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens) {
  check(scores, topk, window_size, num_sinks, pool_size, cu_seqlens);
  check_cu_seqlens_values(cu_seqlens, scores.size(1));
  Tensors4 outputs = allocate(scores);
  auto& [tau, expiry, frac_begin, frac_end] = outputs;
  SelectParams params{};
  params.dtype = dtype_of(scores);
  params.scores = scores.const_data_ptr();
  params.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
  params.tau = tau.data_ptr();
  params.expiry = expiry.data_ptr<int32_t>();
  params.frac_begin = frac_begin.data_ptr<int32_t>();
  params.frac_end = frac_end.data_ptr<int32_t>();
  params.scores_strides = strides_of(scores);
  params.out_strides = strides_of(tau);
  params.batch = checked_int32("batch", scores.size(0));
  params.seqlen = checked_int32("seqlen", scores.size(1));
  params.num_kv_heads = checked_int32("num_kv_heads", scores.size(2));
  params.num_documents = given(cu_seqlens) ? checked_int32("documents", cu_seqlens->size(0) - 1) : 1;
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = static_cast<int32_t>(check_selection(topk, pool_size));
  cpu::select(params);
  return outputs;
}

struct ChunkSizes {
  c10::SymInt batch, chunk, num_kv_heads, topk, pool_capacity, new_pool_capacity;
};

ChunkSizes check_chunk(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                       const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                       int64_t num_sinks, int64_t pool_size) {
  check_scores("candidate_scores", candidate_scores);
  const Argument like{"candidate_scores", candidate_scores, ""};
  const ChunkSizes sizes{
      candidate_scores.sym_size(0),
      candidate_scores.sym_size(1),
      candidate_scores.sym_size(2),
      topk,
      pool_scores.dim() == 3 ? pool_scores.sym_size(2) : 0,
      pool_size > 0 ? c10::SymInt(pool_size) : pool_scores.sym_size(-1) + candidate_scores.sym_size(1)};
  const at::ScalarType dtype = candidate_scores.scalar_type();
  check_tensor({"slot_scores", slot_scores, "[batch, num_kv_heads, topk]"}, {sizes.batch, sizes.num_kv_heads, topk},
               dtype, like);
  check_tensor({"slot_positions", slot_positions, "[batch, num_kv_heads, topk]"},
               {sizes.batch, sizes.num_kv_heads, topk}, at::kLong, like);
  check_tensor({"pool_scores", pool_scores, "[batch, num_kv_heads, pool_size]"},
               {sizes.batch, sizes.num_kv_heads, pool_size > 0 ? c10::SymInt(pool_size) : sizes.pool_capacity}, dtype,
               like);
  check_tensor({"lengths", lengths, "[batch]"}, {sizes.batch}, at::kLong, like);
  TORCH_CHECK_VALUE(sizes.pool_capacity >= topk, "pool_scores must hold at least topk = ", topk, " scores, got ",
                    sizes.pool_capacity);
  check_window(window_size, num_sinks);
  check_selection(topk, pool_size);
  return sizes;
}

Tensors12 allocate_chunk(const ChunkSizes& sizes, const Tensor& scores) {
  const c10::SymInt &b = sizes.batch, &h = sizes.num_kv_heads;
  const auto slots = [&] { return int32_of({b, h, sizes.topk}, scores); };
  const auto pool = [&] { return int32_of({b, h, sizes.pool_capacity}, scores); };
  const auto arrivals = [&] { return int32_of({b, h, sizes.chunk}, scores); };
  return {empty_of({b, h, sizes.chunk}, scores.options()),
          slots(),
          slots(),
          slots(),
          pool(),
          pool(),
          arrivals(),
          arrivals(),
          arrivals(),
          slots(),
          int64_of({b, h, sizes.topk}, scores),
          int32_of({b, h, sizes.new_pool_capacity}, scores)};
}

Tensors12 select_chunk_meta(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                            const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                            int64_t num_sinks, int64_t pool_size) {
  return allocate_chunk(check_chunk(candidate_scores, slot_scores, slot_positions, pool_scores, lengths, topk,
                                    window_size, num_sinks, pool_size),
                        candidate_scores);
}

Tensors12 select_chunk_cpu(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                           const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                           int64_t num_sinks, int64_t pool_size) {
  const ChunkSizes sizes = check_chunk(candidate_scores, slot_scores, slot_positions, pool_scores, lengths, topk,
                                       window_size, num_sinks, pool_size);
  const Tensor slots = slot_scores.contiguous(), positions = slot_positions.contiguous();
  const Tensor pool = pool_scores.contiguous(), tokens = lengths.contiguous();
  check_lengths_values(tokens);
  Tensors12 outputs = allocate_chunk(sizes, candidate_scores);
  auto& [tau, slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end, arrival_expiry,
         arrival_frac_begin, arrival_frac_end, new_slot_source, new_slot_positions, new_pool_source] = outputs;
  SelectChunkParams params{};
  params.dtype = dtype_of(candidate_scores);
  params.candidate_scores = candidate_scores.const_data_ptr();
  params.slot_scores = slots.const_data_ptr();
  params.slot_positions = positions.const_data_ptr<int64_t>();
  params.pool_scores = pool.const_data_ptr();
  params.lengths = tokens.const_data_ptr<int64_t>();
  params.tau = tau.data_ptr();
  params.slot_expiry = slot_expiry.data_ptr<int32_t>();
  params.slot_frac_begin = slot_frac_begin.data_ptr<int32_t>();
  params.slot_frac_end = slot_frac_end.data_ptr<int32_t>();
  params.pool_frac_begin = pool_frac_begin.data_ptr<int32_t>();
  params.pool_frac_end = pool_frac_end.data_ptr<int32_t>();
  params.arrival_expiry = arrival_expiry.data_ptr<int32_t>();
  params.arrival_frac_begin = arrival_frac_begin.data_ptr<int32_t>();
  params.arrival_frac_end = arrival_frac_end.data_ptr<int32_t>();
  params.new_slot_source = new_slot_source.data_ptr<int32_t>();
  params.new_slot_positions = new_slot_positions.data_ptr<int64_t>();
  params.new_pool_source = new_pool_source.data_ptr<int32_t>();
  params.scores_strides = strides_of(candidate_scores);
  params.tau_strides = {tau.stride(0), tau.stride(2), tau.stride(1)};  // tau is [batch, num_kv_heads, chunk]
  params.batch = checked_int32("batch", candidate_scores.size(0));
  params.chunk = checked_int32("chunk", candidate_scores.size(1));
  params.num_kv_heads = checked_int32("num_kv_heads", candidate_scores.size(2));
  params.topk = static_cast<int32_t>(topk);
  params.window_size = static_cast<int32_t>(window_size);
  params.num_sinks = static_cast<int32_t>(num_sinks);
  params.pool_size = static_cast<int32_t>(pool_size);
  params.pool_capacity = checked_int32("pool_scores", pool_scores.size(2));
  params.new_pool_capacity = checked_int32("pool_scores", new_pool_source.size(2));
  cpu::select_chunk(params);
  return outputs;
}

}  // namespace

int64_t default_pool_size(int64_t topk) {
  return check_selection(topk, {});
}

Tensors4 call_select(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                     std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens) {
  static const auto operation = find_operation<decltype(select_cpu)>("sparsek::select");
  return operation.call(scores, topk, window_size, num_sinks, pool_size, cu_seqlens);
}

Tensors4 select(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens) {
  return call_select(scores, topk, window_size, num_sinks, pool_size, cu_seqlens);
}

Tensors12 call_select_chunk(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                            const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                            int64_t num_sinks, int64_t pool_size) {
  static const auto operation = find_operation<decltype(select_chunk_cpu)>("sparsek::_select_chunk");
  return operation.call(candidate_scores, slot_scores, slot_positions, pool_scores, lengths, topk, window_size,
                        num_sinks, pool_size);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("select", select_cpu);
  m.impl("_select_chunk", select_chunk_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("select", select_meta);
  m.impl("_select_chunk", select_chunk_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("select", torch::CppFunction::makeFallthrough());
  m.impl("_select_chunk", torch::CppFunction::makeFallthrough());
}

}  // namespace sparsek::ops
