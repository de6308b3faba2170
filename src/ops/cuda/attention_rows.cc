// _attention_rows and attention_backward on the GPU: eq. 7-11 on rows (kernels/params.h).
#include "kernels/cuda/attention.h"
#include "kernels/cuda/rows/live_lists.h"
#include "ops/cuda/checks.h"
#include "ops/cuda/far_lists.h"
#include "ops/far_lists.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kQueries = "[batch, seqlen_q, num_heads, head_dim]";
constexpr const char* kKeys = "[batch, seqlen_k, num_kv_heads, head_dim]";
constexpr const char* kRows = "[batch, num_kv_heads, rows]";

// The inputs that forward and backward share: checked, as parameters, with the contiguous copies these point to.
struct Rows {
  const Tensor &q, &k, &v;
  const MaybeTensor &q_far, &k_far;
  int64_t batch, seqlen_q, num_heads, head_dim, seqlen_k, num_kv_heads, num_pool_rows;
  bool far;
  Tensor scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end;
  AttentionFwdParams params{};

  Rows(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far, const MaybeTensor& k_far,
       const Tensor& row_scores, const Tensor& tau, const Tensor& window_begin, const Tensor& far_begin,
       const Tensor& far_end, const Tensor& frac_begin, const Tensor& frac_end, Gate gate, double softmax_scale)
      : q(q), k(k), v(v), q_far(q_far), k_far(k_far), far(given(q_far)) {
    check_sizes();
    const Argument like{"q", q, kQueries};
    const int64_t score_rows = row_scores.dim() == 3 ? row_scores.size(2) : 0;
    check_value(score_rows >= seqlen_k, "row_scores must be ", kRows, " with one score for each of the ", seqlen_k,
                " key rows, got ", shape_text(row_scores));
    const auto check_rows = [&](const char* name, const Tensor& tensor, int64_t rows, ScalarType dtype) {
      check_tensor({name, tensor, kRows}, {batch, num_kv_heads, rows}, dtype, like);
    };
    check_rows("row_scores", row_scores, score_rows, ScalarType::Float);
    check_rows("tau", tau, seqlen_q, ScalarType::Float);
    check_tensor({"window_begin", window_begin, "[batch, seqlen_q]"}, {batch, seqlen_q}, ScalarType::Int, like);
    check_rows("far_begin", far_begin, seqlen_k, ScalarType::Int);
    check_rows("far_end", far_end, seqlen_k, ScalarType::Int);
    check_rows("frac_begin", frac_begin, score_rows, ScalarType::Int);
    check_rows("frac_end", frac_end, score_rows, ScalarType::Int);

    num_pool_rows = score_rows - seqlen_k;
    Tensor key_scores = row_scores;
    if (num_pool_rows > 0) key_scores = torch::stable::narrow(key_scores, 2, num_pool_rows, seqlen_k);
    scores = as_contiguous(key_scores);
    this->tau = as_contiguous(tau);
    this->window_begin = as_contiguous(window_begin);
    this->far_begin = as_contiguous(far_begin);
    this->far_end = as_contiguous(far_end);
    this->frac_begin = as_contiguous(frac_begin);
    this->frac_end = as_contiguous(frac_end);
    describe(gate, softmax_scale);
  }

 private:
  void check_sizes() {
    const Argument like{"q", q, kQueries};
    check_ndim(like, 4);
    check_ndim({"k", k, kKeys}, 4);
    params.dtype = check_half(like);
    batch = q.size(0), seqlen_q = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
    seqlen_k = k.size(1), num_kv_heads = k.size(2);
    const auto check_heads = [&](const char* name, const Tensor& tensor, bool keys) {
      const Argument argument{name, tensor, keys ? kKeys : kQueries};
      check_tensor(argument, {batch, keys ? seqlen_k : seqlen_q, keys ? num_kv_heads : num_heads, head_dim},
                   q.scalar_type(), like);
      check_rows_of_16_bytes(argument);
    };
    check_value(batch >= 1 && seqlen_q >= 1, "q must have at least one batch row and one position, got ",
                shape_text(q));
    check_value(num_kv_heads >= 1 && num_heads % num_kv_heads == 0,
                "num_heads must be a multiple of num_kv_heads, got ", num_heads, " and ", num_kv_heads);
    check_lanes(like, batch, num_kv_heads);
    check_heads("q", q, false);
    check_heads("k", k, true);
    check_heads("v", v, true);
    check_value(far == given(k_far), "q_far and k_far must be given together");
    if (far) {
      check_heads("q_far", *q_far, false);
      check_heads("k_far", *k_far, true);
    }
    check_value(seqlen_k >= seqlen_q, "k must hold the queries' own keys last: at least ", seqlen_q, " rows, got ",
                seqlen_k);
  }

  void describe(Gate gate, double softmax_scale) {
    params.q = q.const_data_ptr();
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    params.q_far = data_or_null<void>(q_far);
    params.k_far = data_or_null<void>(k_far);
    params.scores = scores.const_data_ptr();
    params.tau = tau.const_data_ptr();
    params.window_begin = const_data<int32_t>(window_begin);
    params.far_begin = const_data<int32_t>(far_begin);
    params.far_end = const_data<int32_t>(far_end);
    params.q_strides = row_strides(q);
    params.k_strides = row_strides(k);
    params.v_strides = row_strides(v);
    if (far) {
      params.q_far_strides = row_strides(*q_far);
      params.k_far_strides = row_strides(*k_far);
    }
    params.out_strides = {seqlen_q * num_heads * head_dim, num_heads * head_dim, head_dim};
    params.batch = checked_int32("batch", batch);
    params.seqlen_q = checked_int32("seqlen_q", seqlen_q);
    params.seqlen_k = checked_int32("seqlen_k", seqlen_k);
    params.num_carried = params.seqlen_k - params.seqlen_q;
    params.num_heads = checked_int32("num_heads", num_heads);
    params.num_kv_heads = checked_int32("num_kv_heads", num_kv_heads);
    params.head_dim = checked_int32("head_dim", head_dim);
    params.gate = gate;
    params.softmax_scale = softmax_scale;
    const char* const served =
        sparsek::cuda::attention_unsupported(params.dtype, params.head_dim, params.num_heads, params.num_kv_heads);
    check_value(served == nullptr, "attention on this GPU needs ", served == nullptr ? "" : served, ", got ",
                toString(q.scalar_type()), " with head_dim ", head_dim, ", ", num_heads, " query heads and ",
                num_kv_heads, " key/value heads");
  }
};

// The rows' lists: those given, or made here, which takes memory by max_far. Rows of which a query sees more than that
// may overflow them: such queries get a NaN as tau, in a copy, and so NaN as output and gradients.
struct Lists {
  MaybeTensor memory, checked_tau, workspace;
  sparsek::cuda::LiveLists lists{};

  Lists(Rows& rows, std::optional<int64_t> max_far, const MaybeTensor& far_lists, const OnDevice& here) {
    check_value(max_far.has_value(), "max_far, the most far rows that a query sees, must be given on a GPU");
    const int chunk = sparsek::cuda::attention_chunk(static_cast<int>(rows.num_heads / rows.num_kv_heads));
    check_value(*max_far >= 0 && *max_far <= int64_t{1} << 30, "max_far must be between 0 and 2^30, got ", *max_far);
    const FarLists sizes(rows.batch * rows.num_kv_heads, rows.seqlen_q, rows.seqlen_k, *max_far, chunk);
    if (given(far_lists) && far_lists->numel() > 0) {
      check_tensor({"far_lists", *far_lists, "[size]"}, {far_lists->numel()}, ScalarType::Int, {"q", rows.q, kQueries});
      check_contiguous({"far_lists", *far_lists, "[size]"});
      const int64_t made = far_lists_size(rows.batch, rows.num_kv_heads, rows.seqlen_q, *max_far);
      check_value(far_lists->numel() == made && rows.seqlen_k == rows.seqlen_q,
                  "far_lists must be what _select_rows made for these rows, ", made, " values for max_far ", *max_far,
                  ", ", rows.seqlen_q, " queries and as many key rows, got ", far_lists->numel(), " values and ",
                  rows.seqlen_k, " key rows");
      lists = sizes.in(*far_lists);
      return;
    }
    memory = empty({sizes.size()}, ScalarType::Int, rows.q);
    lists = sizes.in(*memory);
    checked_tau = new_like(rows.tau);
    workspace = here.workspace(sparsek::cuda::live_lists_workspace_bytes(rows.params, chunk));
    sparsek::cuda::live_lists(rows.params, chunk, lists, data<float>(*checked_tau), workspace->mutable_data_ptr(),
                              here.stream());
    rows.params.tau = checked_tau->const_data_ptr();
  }
};

Tensors2 attention_rows(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                        const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                        const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                        const Tensor& frac_begin, const Tensor& frac_end, Gate gate, double softmax_scale,
                        bool deterministic, std::optional<int64_t> max_far, const MaybeTensor& far_lists) {
  check_on_gpu({"q", q, kQueries});
  const OnDevice here(q);
  Rows rows(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, gate,
            softmax_scale);
  const Tensor out = new_like(q),
               softmax_lse = empty({rows.batch, rows.num_heads, rows.seqlen_q}, ScalarType::Float, q);
  rows.params.out = out.mutable_data_ptr();
  rows.params.softmax_lse = softmax_lse.mutable_data_ptr();
  const Lists lists(rows, max_far, far_lists, here);
  sparsek::cuda::attention_forward(rows.params, lists.lists, here.stream());
  return {out, softmax_lse};
}

Tensors6 attention_backward(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                            const Tensor& v, const MaybeTensor& q_far, const MaybeTensor& k_far,
                            const Tensor& row_scores, const Tensor& tau, const Tensor& window_begin,
                            const Tensor& far_begin, const Tensor& far_end, const Tensor& frac_begin,
                            const Tensor& frac_end, const Tensor& out, const Tensor& softmax_lse, Gate gate,
                            double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                            const MaybeTensor& far_lists) {
  check_on_gpu({"q", q, kQueries});
  const OnDevice here(q);
  Rows rows(q, k, v, q_far, k_far, row_scores, tau, window_begin, far_begin, far_end, frac_begin, frac_end, gate,
            softmax_scale);
  const Argument like{"q", q, kQueries};
  const char* lse_layout = "[batch, num_heads, seqlen_q]";
  check_tensor({"out", out, kQueries}, {rows.batch, rows.seqlen_q, rows.num_heads, rows.head_dim}, q.scalar_type(),
               like);
  check_tensor({"dout", dout, kQueries}, {rows.batch, rows.seqlen_q, rows.num_heads, rows.head_dim}, q.scalar_type(),
               like);
  check_tensor({"softmax_lse", softmax_lse, lse_layout}, {rows.batch, rows.num_heads, rows.seqlen_q}, ScalarType::Float,
               like);
  if (given(dlse)) {
    check_tensor({"dlse", *dlse, lse_layout}, {rows.batch, rows.num_heads, rows.seqlen_q}, ScalarType::Float, like);
  }
  // The gradient's layout is not the user's choice (sum().backward() gives stride 0): copied where need be.
  const Tensor outputs = as_contiguous(out), lse = as_contiguous(softmax_lse), douts = as_contiguous(dout);
  const MaybeTensor dlses = as_contiguous(dlse);
  check_rows_of_16_bytes({"dout", douts, kQueries});
  rows.params.out = outputs.mutable_data_ptr();
  rows.params.softmax_lse = lse.mutable_data_ptr();

  const auto none = [&] { return empty({0}, q.scalar_type(), q); };
  const Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v), dscores = new_like(row_scores);
  const Tensor dq_far = rows.far ? new_like(q) : none(), dk_far = rows.far ? new_like(k) : none();
  AttentionBwdParams params{};
  const Lists lists(rows, max_far, far_lists, here);
  params.fwd = rows.params;
  params.dout = douts.const_data_ptr();
  params.dlse = data_or_null<void>(dlses);
  params.frac_begin = const_data<int32_t>(rows.frac_begin);
  params.frac_end = const_data<int32_t>(rows.frac_end);
  params.dq = dq.mutable_data_ptr();
  params.dk = dk.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dq_far = rows.far ? dq_far.mutable_data_ptr() : nullptr;
  params.dk_far = rows.far ? dk_far.mutable_data_ptr() : nullptr;
  params.dscores = dscores.mutable_data_ptr();
  params.dout_strides = rows.params.out_strides;
  params.num_pool_rows = checked_int32("pool rows", rows.num_pool_rows);
  params.deterministic = deterministic;
  const Tensor workspace = here.workspace(sparsek::cuda::attention_backward_workspace_bytes(params, lists.lists));
  sparsek::cuda::attention_backward(params, lists.lists, workspace.mutable_data_ptr(), here.stream());
  return {dq, dk, dv, dq_far, dk_far, dscores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("_attention_rows", TORCH_BOX(&attention_rows));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace sparsek::ops::cuda
