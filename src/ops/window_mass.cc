// window_mass and window_mass_chunk: eq. 1b, what a key's own window paid it in the older half. No gradient.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log.h>

#include <torch/library.h>

#include "kernels/cpu/attention/attention.h"
#include "ops/autocast.h"
#include "ops/ops.h"
#include "ops/state.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

Tensor allocate(const Tensor& q, const Tensor& k) {
  return empty_of({k.sym_size(0), k.sym_size(2), k.sym_size(1)}, q.options().dtype(scores_dtype(q.scalar_type())));
}

Tensor mass_rows_meta(const Tensor& q, const Tensor& k, const MaybeTensor& q_far, const MaybeTensor& k_far,
                      const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                      const MaybeTensor& mass_in, int64_t window_size, double softmax_scale) {
  return allocate(q, k);
}

Tensor mass_rows_cpu(const Tensor& q, const Tensor& k, const MaybeTensor& q_far, const MaybeTensor& k_far,
                     const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                     const MaybeTensor& mass_in, int64_t window_size, double softmax_scale) {
  const Argument like{"q", q, "[batch, seqlen_q, num_heads, head_dim]"};
  check_ndim(like, 4);
  check_ndim({"k", k, "[batch, seqlen_k, num_kv_heads, head_dim]"}, 4);
  const int64_t batch = q.size(0), seqlen_q = q.size(1), seqlen_k = k.size(1), heads = k.size(2), head_dim = q.size(3);
  const auto check_keys = [&](const char* name, const Tensor& tensor) {
    const Argument keys{name, tensor, "[batch, seqlen_k, num_kv_heads, head_dim]"};
    check_tensor(keys, {batch, seqlen_k, heads, head_dim}, q.scalar_type(), like);
    check_inner_contiguous(keys);
  };
  check_keys("k", k);
  check_inner_contiguous(like);
  TORCH_CHECK_VALUE(given(q_far) == given(k_far), "q_far and k_far must be given together");
  if (given(q_far)) {
    check_keys("k_far", *k_far);
    const Argument far{"q_far", *q_far, like.layout};
    check_tensor(far, {batch, seqlen_q, q.size(2), head_dim}, q.scalar_type(), like);
    check_inner_contiguous(far);
  }
  TORCH_CHECK_VALUE(seqlen_k >= seqlen_q && heads >= 1 && q.size(2) % heads == 0,
                    "k must hold the queries' keys last, and num_heads be a multiple of num_kv_heads, got ", k.sizes(),
                    " for q ", q.sizes());
  check_tensor({"window_begin", window_begin, "[batch, seqlen_q]"}, {batch, seqlen_q}, at::kInt, like, true);
  check_tensor({"far_begin", far_begin, "[batch, seqlen_k]"}, {batch, seqlen_k}, at::kInt, like, true);
  check_tensor({"far_end", far_end, "[batch, seqlen_k]"}, {batch, seqlen_k}, at::kInt, like, true);
  check_rows_values(window_begin, far_begin, far_end);
  TORCH_CHECK_VALUE(window_size >= 1, "window_size must be at least 1, got ", window_size);
  const Tensor mass = allocate(q, k);
  const MaybeTensor initial = given(mass_in) ? MaybeTensor(mass_in->contiguous()) : MaybeTensor();
  if (given(initial)) {
    check_tensor({"mass_in", *initial, "[batch, num_kv_heads, seqlen_k]"}, {batch, heads, seqlen_k}, mass.scalar_type(),
                 like);
  }
  WindowMassParams params{};
  params.dtype = dtype_of(q);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.q_far = data_or_null<void>(q_far);
  params.k_far = data_or_null<void>(k_far);
  params.window_begin = int32_data(window_begin);
  params.far_begin = int32_data(far_begin);
  params.far_end = int32_data(far_end);
  params.mass_in = data_or_null<void>(initial);
  params.mass = mass.data_ptr();
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  if (given(q_far)) {
    params.q_far_strides = strides_of(*q_far);
    params.k_far_strides = strides_of(*k_far);
  }
  params.batch = checked_int32("batch", batch);
  params.seqlen_q = checked_int32("seqlen_q", seqlen_q);
  params.seqlen_k = checked_int32("seqlen_k", seqlen_k);
  params.num_carried = params.seqlen_k - params.seqlen_q;
  params.num_heads = checked_int32("num_heads", q.size(2));
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.head_dim = checked_int32("head_dim", head_dim);
  params.window_size = checked_int32("window_size", window_size);
  params.softmax_scale = softmax_scale;
  cpu::window_mass(params);
  return mass;
}

Tensor call_mass_rows(const Tensor& q, const Tensor& k, const MaybeTensor& q_far, const MaybeTensor& k_far,
                      const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                      const MaybeTensor& mass_in, int64_t window_size, double softmax_scale) {
  static const auto operation = find_operation<decltype(mass_rows_cpu)>("sparsek::_window_mass_rows");
  return operation.call(q, k, q_far, k_far, window_begin, far_begin, far_end, mass_in, window_size, softmax_scale);
}

Tensor window_mass_composite(const Tensor& q, const Tensor& k, int64_t window_size, int64_t num_sinks,
                             std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                             const MaybeTensor& cu_seqlens) {
  check_attention({q, k, nullptr, nullptr, q_far, k_far});
  check_cu_seqlens(cu_seqlens, "q", q);
  check_window(window_size, num_sinks);
  const auto [window_begin, far_begin, far_end, num_queries] =
      call_window_rows(q, {}, place_cu_seqlens(cu_seqlens, q), window_size, num_sinks);
  const Tensor mass = call_mass_rows(q, k, q_far, k_far, window_begin, far_begin, far_end, {}, window_size,
                                     scale_or_default(softmax_scale, q));
  // Without a query the mass is 0 as well.
  return at::log(mass.transpose(1, 2) / num_queries.clamp_min(1).unsqueeze(2) + kFloor);
}

Tensors2 window_mass_chunk_composite(const Tensor& q, const Tensor& k, const Tensor& state_k, const MaybeTensor& ring_k,
                                     const Tensor& ring_mass, const Tensor& lengths, int64_t window_size,
                                     int64_t num_sinks, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                     const MaybeTensor& k_far) {
  check_attention({q, k, nullptr, nullptr, q_far, k_far});
  check_window(window_size, num_sinks);
  const bool far = given(q_far);
  check_state({.k = state_k, .ring_k = ring_k, .ring_mass = &ring_mass, .lengths = lengths}, q, k, far, /*topk=*/-1,
              window_size, num_sinks, /*pool_size=*/0);
  const auto [window_begin, far_begin, far_end, num_queries] = call_window_rows(q, lengths, {}, window_size, num_sinks);

  // Rows [sinks | ring in position order | chunk].
  const Tensor order = ring_order(lengths, window_size);
  const Tensor sinks = at::arange(num_sinks, lengths.options()).expand_symint({lengths.sym_size(0), num_sinks});
  const Tensor state_rows = take_rows_of_every_head(state_k, at::cat({sinks, order + num_sinks}, 1));
  Tensor rows_k, rows_far;
  if (far) {  // sinks are never in a window, so their rows of rows_k are never read
    rows_far = at::cat({state_rows, *k_far}, 1);
    rows_k = at::cat({state_rows.slice(1, 0, num_sinks), take_rows_of_every_head(*ring_k, order), k}, 1);
  } else {
    rows_k = at::cat({state_rows, k}, 1);
  }
  const Tensor chunk_zeros = ring_mass.new_zeros_symint({q.sym_size(0), k.sym_size(2), q.sym_size(1)});
  const Tensor sink_zeros = ring_mass.new_zeros_symint({q.sym_size(0), k.sym_size(2), num_sinks});
  const Tensor mass_in = at::cat({sink_zeros, ring_in_order(ring_mass, order), chunk_zeros}, 2);
  const Tensor mass = call_mass_rows(q, rows_k, q_far, far ? MaybeTensor(rows_far) : MaybeTensor(), window_begin,
                                     far_begin, far_end, mass_in, window_size, scale_or_default(softmax_scale, q));
  const Tensor arriving = mass.slice(2, num_sinks);
  const Tensor leaving = arriving.slice_symint(2, 0, q.sym_size(1)).transpose(1, 2);
  return {at::log(leaving / num_mass_queries(window_size) + kFloor),
          new_ring(arriving, lengths, q.sym_size(1), window_size)};
}

Tensor call_window_mass(const Tensor& q, const Tensor& k, int64_t window_size, int64_t num_sinks,
                        std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                        const MaybeTensor& cu_seqlens) {
  static const auto operation = find_operation<decltype(window_mass_composite)>("sparsek::window_mass");
  return operation.call(q, k, window_size, num_sinks, softmax_scale, q_far, k_far, cu_seqlens);
}

Tensors2 call_window_mass_chunk(const Tensor& q, const Tensor& k, const Tensor& state_k, const MaybeTensor& ring_k,
                                const Tensor& ring_mass, const Tensor& lengths, int64_t window_size, int64_t num_sinks,
                                std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                const MaybeTensor& k_far) {
  static const auto operation = find_operation<decltype(window_mass_chunk_composite)>("sparsek::window_mass_chunk");
  return operation.call(q, k, state_k, ring_k, ring_mass, lengths, window_size, num_sinks, softmax_scale, q_far, k_far);
}

template <c10::DeviceType device>
Tensor window_mass_autocast(const Tensor& q, const Tensor& k, int64_t window_size, int64_t num_sinks,
                            std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                            const MaybeTensor& cu_seqlens) {
  const Autocast<device> cast;
  return call_window_mass(cast(q), cast(k), window_size, num_sinks, softmax_scale, cast(q_far), cast(k_far),
                          cu_seqlens);
}

template <c10::DeviceType device>
Tensors2 window_mass_chunk_autocast(const Tensor& q, const Tensor& k, const Tensor& state_k, const MaybeTensor& ring_k,
                                    const Tensor& ring_mass, const Tensor& lengths, int64_t window_size,
                                    int64_t num_sinks, std::optional<double> softmax_scale, const MaybeTensor& q_far,
                                    const MaybeTensor& k_far) {
  const Autocast<device> cast;
  return call_window_mass_chunk(cast(q), cast(k), state_k, ring_k, ring_mass, lengths, window_size, num_sinks,
                                softmax_scale, cast(q_far), cast(k_far));
}

}  // namespace

Tensor window_mass(const Tensor& q, const Tensor& k, int64_t window_size, int64_t num_sinks,
                   std::optional<double> softmax_scale, const MaybeTensor& q_far, const MaybeTensor& k_far,
                   const MaybeTensor& cu_seqlens) {
  return call_window_mass(q, k, window_size, num_sinks, softmax_scale, q_far, k_far, cu_seqlens);
}

std::tuple<Tensor, Tensor> window_mass_chunk(const Tensor& q, const Tensor& k, const AttentionState& state,
                                             const AttentionOptions& options, const MaybeTensor& q_far,
                                             const MaybeTensor& k_far) {
  TORCH_CHECK_VALUE(state.ring_mass.defined(), "the state has no ring_mass: create it with delayed_scores");
  const MaybeTensor ring_k = state.ring_k.defined() ? MaybeTensor(state.ring_k) : MaybeTensor();
  return call_window_mass_chunk(q, k, state.k, ring_k, state.ring_mass, state.lengths, options.window_size,
                                options.num_sinks, options.softmax_scale, q_far, k_far);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("_window_mass_rows", mass_rows_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("_window_mass_rows", mass_rows_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("_window_mass_rows", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(sparsek, CompositeImplicitAutograd, m) {
  m.impl("window_mass", window_mass_composite);
  m.impl("window_mass_chunk", window_mass_chunk_composite);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCPU, m) {
  m.impl("window_mass", window_mass_autocast<at::kCPU>);
  m.impl("window_mass_chunk", window_mass_chunk_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(sparsek, AutocastCUDA, m) {
  m.impl("window_mass", window_mass_autocast<at::kCUDA>);
  m.impl("window_mass_chunk", window_mass_chunk_autocast<at::kCUDA>);
}

}  // namespace sparsek::ops
