// Checks at the operations' boundary: ndim, dtype, device, shape, stride, value range, in this order. Every message
// states what was wanted and what was given. Sizes may be symbolic (torch.compile). Values that live in a tensor are
// checked on the CPU only; on a GPU that would stall the stream.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <optional>
#include <string_view>

#include "kernels/params.h"

namespace sparsek::ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A tensor argument with the layout its documentation names, e.g. {"k", k, "[batch, seqlen_k, num_kv_heads,
// head_dim]"}.
struct Argument {
  const char* name;
  const Tensor& tensor;
  const char* layout;
};

void check_ndim(const Argument& argument, int64_t ndim);
void check_dtype(const Argument& argument, at::ScalarType wanted, const char* why);
void check_device(const Argument& argument, const Argument& like);
void check_shape(const Argument& argument, std::initializer_list<c10::SymInt> wanted);
void check_inner_contiguous(const Argument& argument);
// All of the above for a tensor of a state or a selection; it must be on the device of `like` and wholly contiguous
// when `contiguous`.
void check_tensor(const Argument& argument, std::initializer_list<c10::SymInt> wanted, at::ScalarType dtype,
                  const Argument& like, bool contiguous = false);

// float64 for float64, otherwise float32.
at::ScalarType scores_dtype(at::ScalarType dtype);
void check_window(int64_t window_size, int64_t num_sinks);
void check_gate(std::string_view gate);
// Throws unless 1 <= topk and pool_size is absent, 0 or larger; returns the pool size in force.
int64_t check_selection(int64_t topk, std::optional<int64_t> pool_size);

// q, k and what comes with them. v and scores may be null.
struct AttentionArguments {
  const Tensor& q;
  const Tensor& k;
  const Tensor* v;
  const Tensor* scores;
  const MaybeTensor& q_far;
  const MaybeTensor& k_far;
};
void check_attention(const AttentionArguments& arguments);
// [batch, seqlen, num_kv_heads] scores of any length.
void check_scores(const char* name, const Tensor& scores);
// On the CPU or on the device of `like`.
void check_cu_seqlens(const MaybeTensor& cu_seqlens, const char* name, const Tensor& like);
// The same documents on the device of `like`. What comes from the CPU is checked, and copied where `like` is not there,
// which waits for the stream; what lives on a GPU is not looked at (the kernels clamp it).
MaybeTensor place_cu_seqlens(const MaybeTensor& cu_seqlens, const Tensor& like);

// CPU only: the values of a checked cu_seqlens.
void check_cu_seqlens_values(const MaybeTensor& cu_seqlens, int64_t seqlen);
// CPU only: the values of a state's contiguous lengths.
void check_lengths_values(const Tensor& lengths);
// CPU only: what the kernels rely on in the row arrays (kernels/params.h), all contiguous. Windows hold the query's own
// row and move one way, far_begin does not decrease with the row, and no query sees a row both ways. window_begin
// [batch, seqlen_q]; far_begin and far_end [batch, seqlen_k] or [batch, num_kv_heads, seqlen_k].
void check_rows_values(const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end);

// Throws when a length does not fit the kernels' 32-bit indices.
int32_t checked_int32(const char* name, int64_t value);

inline Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
DType dtype_of(const Tensor& tensor);
Gate gate_of(std::string_view gate);
double scale_or_default(std::optional<double> softmax_scale, const Tensor& q);

template <class T>
T* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}
inline bool given(const MaybeTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

}  // namespace sparsek::ops
