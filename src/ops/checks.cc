// See checks.h.
#include "ops/checks.h"

#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace sparsek::ops {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxGroup = 64;                 // of query heads that share a KV head, on a GPU
constexpr int64_t kMaxLength = int64_t{1} << 30;  // sums of two lengths stay inside 32 bits

int64_t as_int(const c10::SymInt& value) {
  return value.guard_int(__FILE__, __LINE__);
}

// On a GPU: what the copy engine reads. Memory begins at multiples of 512 bytes, so an offset tells the address.
void check_rows_of_16_bytes(const Argument& argument) {
  const Tensor& tensor = argument.tensor;
  const int64_t elements = 16 / static_cast<int64_t>(tensor.element_size());
  bool is_aligned = tensor.sym_storage_offset() % elements == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    const c10::SymInt stride = tensor.sym_stride(i);
    is_aligned = is_aligned && (tensor.sym_size(i) == 1 || (stride > 0 && stride % elements == 0));
  }
  TORCH_CHECK_VALUE(is_aligned, argument.name,
                    " must have rows that lie at multiples of 16 bytes, none of them twice, ", "on a GPU, got strides ",
                    tensor.sym_strides(), " from element ", tensor.sym_storage_offset());
}

void check_far_pair(const MaybeTensor& q_far, const MaybeTensor& k_far) {
  TORCH_CHECK_VALUE(given(q_far) == given(k_far), "q_far and k_far must be given together, got only ",
                    given(q_far) ? "q_far" : "k_far");
}

}  // namespace

void check_ndim(const Argument& argument, int64_t ndim) {
  TORCH_CHECK_VALUE(argument.tensor.dim() == ndim, argument.name, " must be ", argument.layout, " (", ndim,
                    " dimensions), got ", argument.tensor.sym_sizes());
}

void check_dtype(const Argument& argument, at::ScalarType wanted, const char* why) {
  TORCH_CHECK_TYPE(argument.tensor.scalar_type() == wanted, argument.name, " must be ", wanted, why, ", got ",
                   argument.tensor.scalar_type());
}

void check_device(const Argument& argument, const Argument& like) {
  TORCH_CHECK_VALUE(argument.tensor.device() == like.tensor.device(), argument.name, " must be on ",
                    like.tensor.device(), " like ", like.name, ", got ", argument.tensor.device());
}

void check_shape(const Argument& argument, std::initializer_list<c10::SymInt> wanted) {
  const auto sizes = argument.tensor.sym_sizes();
  bool equal = sizes.size() == wanted.size();
  size_t dimension = 0;
  for (const c10::SymInt& size : wanted) {
    equal = equal && sizes[dimension] == size;
    ++dimension;
  }
  TORCH_CHECK_VALUE(equal, argument.name, " must be ", argument.layout, " = ",
                    c10::SymIntArrayRef(wanted.begin(), wanted.size()), ", got ", sizes);
}

void check_inner_contiguous(const Argument& argument) {
  const int64_t last = argument.tensor.dim() - 1;
  TORCH_CHECK_VALUE(argument.tensor.sym_size(last) == 1 || argument.tensor.sym_stride(last) == 1, argument.name,
                    " must have a contiguous last dimension (stride 1), got strides ", argument.tensor.sym_strides());
}

void check_tensor(const Argument& argument, std::initializer_list<c10::SymInt> wanted, at::ScalarType dtype,
                  const Argument& like, bool contiguous) {
  check_ndim(argument, static_cast<int64_t>(wanted.size()));
  check_dtype(argument, dtype, "");
  check_device(argument, like);
  check_shape(argument, wanted);
  TORCH_CHECK_VALUE(!contiguous || argument.tensor.is_contiguous(), argument.name, " must be contiguous, got strides ",
                    argument.tensor.sym_strides());
}

at::ScalarType scores_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

void check_window(int64_t window_size, int64_t num_sinks) {
  TORCH_CHECK_VALUE(window_size >= 1 && window_size <= kMaxLength, "window_size must be between 1 and 2^30, got ",
                    window_size);
  TORCH_CHECK_VALUE(num_sinks >= 0 && num_sinks <= kMaxLength, "num_sinks must be between 0 and 2^30, got ", num_sinks);
}

void check_gate(std::string_view gate) {
  TORCH_CHECK_VALUE(gate == "soft" || gate == "hard", "gate must be \"soft\" or \"hard\", got \"", gate, "\"");
}

int64_t check_selection(int64_t topk, std::optional<int64_t> pool_size) {
  TORCH_CHECK_VALUE(topk >= 1 && topk <= kMaxLength / 4, "topk must be between 1 and 2^28, got ", topk);
  const int64_t pool = pool_size.value_or(std::max<int64_t>(4 * topk, 1024));
  TORCH_CHECK_VALUE(pool == 0 || (pool > topk && pool <= kMaxLength),
                    "pool_size must be 0 (no limit) or more than topk = ", topk, ", got ", pool);
  return pool;
}

void check_attention(const AttentionArguments& arguments) {
  const Argument q{"q", arguments.q, "[batch, seqlen, num_heads, head_dim]"};
  const Argument k{"k", arguments.k, "[batch, seqlen, num_kv_heads, head_dim]"};
  std::vector<Argument> like_q, like_k;
  if (arguments.v != nullptr) like_k.push_back({"v", *arguments.v, k.layout});
  if (given(arguments.q_far)) like_q.push_back({"q_far", *arguments.q_far, q.layout});
  if (given(arguments.k_far)) like_k.push_back({"k_far", *arguments.k_far, k.layout});
  std::vector<Argument> all = {q, k};
  for (const Argument& argument : like_q) all.push_back(argument);
  for (const Argument& argument : like_k) all.push_back(argument);

  for (const Argument& argument : all) check_ndim(argument, 4);
  const Argument scores{"scores", arguments.scores != nullptr ? *arguments.scores : arguments.q,
                        "[batch, seqlen, num_kv_heads]"};
  if (arguments.scores != nullptr) check_ndim(scores, 3);

  const at::ScalarType dtype = q.tensor.scalar_type();
  if (q.tensor.is_cuda()) {
    TORCH_CHECK_TYPE(dtype == at::kBFloat16 || dtype == at::kHalf, "q must be BFloat16 or Half on a GPU, got ", dtype);
  } else {
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble,
                     "q must be Float, BFloat16 or Double, got ", dtype);
  }
  for (const Argument& argument : all) check_dtype(argument, dtype, " like q");
  if (arguments.scores != nullptr) {
    check_dtype(scores, scores_dtype(dtype),
                dtype == at::kDouble ? " like q" : " (scores are never half precision: use scores.float())");
  }

  for (const Argument& argument : all) check_device(argument, q);
  if (arguments.scores != nullptr) check_device(scores, q);

  const c10::SymInt batch = q.tensor.sym_size(0), seqlen = q.tensor.sym_size(1), num_heads = q.tensor.sym_size(2),
                    head_dim = q.tensor.sym_size(3), num_kv_heads = k.tensor.sym_size(2);
  check_shape(k, {batch, seqlen, num_kv_heads, head_dim});
  for (const Argument& argument : like_q) check_shape(argument, {batch, seqlen, num_heads, head_dim});
  for (const Argument& argument : like_k) check_shape(argument, {batch, seqlen, num_kv_heads, head_dim});
  if (arguments.scores != nullptr) check_shape(scores, {batch, seqlen, num_kv_heads});

  for (const Argument& argument : all) check_inner_contiguous(argument);

  TORCH_CHECK_VALUE(batch >= 1 && seqlen >= 1, "q must have at least one batch row and one position, got ",
                    q.tensor.sym_sizes());
  TORCH_CHECK_VALUE(seqlen <= kMaxLength, "q must have at most 2^30 positions, got ", seqlen);
  const int64_t heads = as_int(num_heads), kv_heads = as_int(num_kv_heads), dim = as_int(head_dim);
  TORCH_CHECK_VALUE(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0,
                    "num_heads must be a multiple of num_kv_heads, got ", heads, " and ", kv_heads);
  if (q.tensor.is_cuda()) {
    TORCH_CHECK_VALUE(dim == 64 || dim == 128, "head_dim must be 64 or 128 on a GPU, got ", dim);
    TORCH_CHECK_VALUE(heads / kv_heads <= kMaxGroup, "num_heads must be at most ", kMaxGroup,
                      " times num_kv_heads on a GPU, got ", heads, " and ", kv_heads);
  } else {
    TORCH_CHECK_VALUE(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, "head_dim must be a multiple of 8 up to ",
                      kMaxHeadDim, ", got ", dim);
  }
  check_far_pair(arguments.q_far, arguments.k_far);
  if (q.tensor.is_cuda()) {
    for (const Argument& argument : all) check_rows_of_16_bytes(argument);
  }
}

void check_scores(const char* name, const Tensor& scores) {
  const Argument argument{name, scores, "[batch, seqlen, num_kv_heads]"};
  check_ndim(argument, 3);
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble, name,
                   " must be Float or Double, got ", scores.scalar_type());
  TORCH_CHECK_VALUE(scores.sym_size(0) >= 1 && scores.sym_size(1) >= 1 && scores.sym_size(2) >= 1, name,
                    " must have at least one batch row, position and head, got ", scores.sym_sizes());
  TORCH_CHECK_VALUE(scores.sym_size(1) <= kMaxLength, name, " must have at most 2^30 positions, got ",
                    scores.sym_sizes());
}

void check_cu_seqlens(const MaybeTensor& cu_seqlens, const char* name, const Tensor& like) {
  if (!given(cu_seqlens)) return;
  const Argument argument{"cu_seqlens", *cu_seqlens, "[num_documents + 1]"};
  check_ndim(argument, 1);
  check_dtype(argument, at::kInt, "");
  if (!cu_seqlens->is_cpu()) check_device(argument, {name, like, ""});
  TORCH_CHECK_VALUE(cu_seqlens->sym_size(0) >= 2,
                    "cu_seqlens must be [num_documents + 1] with at least one document, got ", cu_seqlens->sym_sizes());
  check_inner_contiguous(argument);
  TORCH_CHECK_VALUE(like.sym_size(0) == 1, name, " must have batch 1 with cu_seqlens, got ", like.sym_sizes());
}

void check_cu_seqlens_values(const MaybeTensor& cu_seqlens, int64_t seqlen) {
  if (!given(cu_seqlens)) return;
  const int32_t* starts = cu_seqlens->const_data_ptr<int32_t>();
  const int64_t last = cu_seqlens->size(0) - 1;
  TORCH_CHECK_VALUE(starts[0] == 0, "cu_seqlens must start at 0, got ", starts[0]);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(starts[i] < starts[i + 1], "cu_seqlens must increase, got ", starts[i], " then ", starts[i + 1],
                      " at index ", i + 1);
  }
  TORCH_CHECK_VALUE(starts[last] == seqlen, "cu_seqlens must end at seqlen = ", seqlen, ", got ", starts[last]);
}

void check_lengths_values(const Tensor& lengths) {
  constexpr int64_t kMostTokens = int64_t{1} << 60;  // positions are added to it
  for (int64_t b = 0; b < lengths.size(0); ++b) {
    const int64_t length = lengths.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(length >= 0, "lengths must not be negative, got ", length, " in batch row ", b);
    TORCH_CHECK_VALUE(length <= kMostTokens, "lengths must be at most 2^60, got ", length, " in batch row ", b);
  }
}

void check_rows_values(const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end) {
  const int64_t batch = window_begin.size(0), seqlen_q = window_begin.size(1), seqlen_k = far_begin.size(-1);
  const int64_t lanes = batch > 0 && seqlen_k > 0 ? far_begin.numel() / (batch * seqlen_k) : 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* const window = window_begin.const_data_ptr<int32_t>() + b * seqlen_q;
    for (int64_t i = 0; i < seqlen_q; ++i) {
      const int64_t least = i > 0 ? window[i - 1] : 0, own = seqlen_k - seqlen_q + i;
      TORCH_CHECK_VALUE(window[i] >= least && window[i] <= own, "window_begin must not decrease and lie between 0 and ",
                        "the query's own row: between ", least, " and ", own, " at batch row ", b, ", query ", i,
                        ", got ", window[i]);
    }
    for (int64_t lane = b * lanes; lane < (b + 1) * lanes; ++lane) {
      const int32_t* const begin = far_begin.const_data_ptr<int32_t>() + lane * seqlen_k;
      const int32_t* const end = far_end.const_data_ptr<int32_t>() + lane * seqlen_k;
      int64_t leaves = 0;  // first query whose window begins behind the row
      for (int64_t r = 0; r < seqlen_k; ++r) {
        TORCH_CHECK_VALUE(r == 0 || begin[r] >= begin[r - 1], "far_begin must not decrease with the row, got ",
                          begin[r - 1], " then ", begin[r], " at batch row ", b, ", row ", r);
        while (leaves < seqlen_q && window[leaves] <= r) ++leaves;
        TORCH_CHECK_VALUE(begin[r] >= leaves || end[r] <= begin[r], "far_begin must be at least ", leaves,
                          ", the first query whose window the row has left, got ", begin[r], " at batch row ", b,
                          ", row ", r);
      }
    }
  }
}

int32_t checked_int32(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= kMaxLength, name, " must be at most 2^30, got ", value);
  return static_cast<int32_t>(value);
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kDouble:
      return DType::kF64;
    default:
      TORCH_CHECK_TYPE(false, "wanted Float, BFloat16 or Double, got ", tensor.scalar_type());
  }
}

Gate gate_of(std::string_view gate) {
  return gate == "hard" ? Gate::kHard : Gate::kSoft;
}

double scale_or_default(std::optional<double> softmax_scale, const Tensor& q) {
  if (!softmax_scale.has_value()) return 1.0 / std::sqrt(static_cast<double>(as_int(q.sym_size(3))));
  TORCH_CHECK_VALUE(std::isfinite(*softmax_scale), "softmax_scale must be finite, got ", *softmax_scale);
  return *softmax_scale;
}

}  // namespace sparsek::ops
