// _window_mass_rows on the GPU: eq. 1b.
#include "kernels/cuda/window_mass/window_mass.h"

#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

Tensor window_mass_rows(const Tensor& q, const Tensor& k, const MaybeTensor& q_far, const MaybeTensor& k_far,
                        const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                        const MaybeTensor& mass_in, int64_t window_size, double softmax_scale) {
  const Argument like{"q", q, "[batch, seqlen_q, num_heads, head_dim]"};
  const char* keys = "[batch, seqlen_k, num_kv_heads, head_dim]";
  check_ndim(like, 4);
  check_ndim({"k", k, keys}, 4);
  const DType dtype = check_half(like);
  const int64_t batch = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t seqlen_k = k.size(1), heads = k.size(2);
  const auto check = [&](const Argument& argument, int64_t seqlen, int64_t count) {
    check_tensor(argument, {batch, seqlen, count, head_dim}, q.scalar_type(), like);
    check_rows_of_16_bytes(argument);
  };
  check(like, seqlen_q, num_heads);
  check({"k", k, keys}, seqlen_k, heads);
  check_value(given(q_far) == given(k_far), "q_far and k_far must be given together");
  if (given(q_far)) {
    check({"q_far", *q_far, like.layout}, seqlen_q, num_heads);
    check({"k_far", *k_far, keys}, seqlen_k, heads);
  }
  check_value(head_dim == 64 || head_dim == 128, "head_dim must be 64 or 128 on a GPU, got ", head_dim);
  check_value(seqlen_k >= seqlen_q && heads >= 1 && num_heads % heads == 0 && num_heads <= 64 * heads,
              "k must hold the queries' keys last, and num_heads be a multiple of num_kv_heads, at most 64 times, got ",
              shape_text(k), " for q ", shape_text(q));
  const auto check_indices = [&](const char* name, const Tensor& tensor, int64_t size) {
    const Argument argument{name, tensor, "[batch, rows]"};
    check_tensor(argument, {batch, size}, ScalarType::Int, like);
    check_contiguous(argument);
  };
  check_indices("window_begin", window_begin, seqlen_q);
  check_indices("far_begin", far_begin, seqlen_k);
  check_indices("far_end", far_end, seqlen_k);
  check_window(window_size, 0);
  const MaybeTensor initial = as_contiguous(mass_in);
  if (given(initial)) {
    check_tensor({"mass_in", *initial, "[batch, num_kv_heads, seqlen_k]"}, {batch, heads, seqlen_k}, ScalarType::Float,
                 like);
  }
  const OnDevice here(q);
  const Tensor mass = empty({batch, heads, seqlen_k}, ScalarType::Float, q);
  WindowMassParams params{};
  params.dtype = dtype;
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.q_far = data_or_null<void>(q_far);
  params.k_far = data_or_null<void>(k_far);
  params.window_begin = const_data<int32_t>(window_begin);
  params.far_begin = const_data<int32_t>(far_begin);
  params.far_end = const_data<int32_t>(far_end);
  params.mass_in = data_or_null<void>(initial);
  params.mass = mass.mutable_data_ptr();
  params.q_strides = row_strides(q);
  params.k_strides = row_strides(k);
  if (given(q_far)) {
    params.q_far_strides = row_strides(*q_far);
    params.k_far_strides = row_strides(*k_far);
  }
  params.batch = checked_int32("batch", batch);
  params.seqlen_q = checked_int32("seqlen_q", seqlen_q);
  params.seqlen_k = checked_int32("seqlen_k", seqlen_k);
  params.num_carried = params.seqlen_k - params.seqlen_q;
  params.num_heads = checked_int32("num_heads", num_heads);
  params.num_kv_heads = checked_int32("num_kv_heads", heads);
  params.head_dim = checked_int32("head_dim", head_dim);
  params.window_size = static_cast<int32_t>(window_size);
  params.softmax_scale = softmax_scale;
  const Tensor workspace = here.workspace(sparsek::cuda::window_mass_workspace_bytes(params));
  sparsek::cuda::window_mass(params, workspace.mutable_data_ptr(), here.stream());
  return mass;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_window_mass_rows", TORCH_BOX(&window_mass_rows));
}

}  // namespace sparsek::ops::cuda
