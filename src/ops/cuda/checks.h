// Checks at this library's boundary, as src/ops/checks.h makes them for the CPU: before any launch, saying what was
// wanted and what was given. std::invalid_argument is Python's ValueError; the stable ABI has no TypeError, so wrong
// dtypes are ValueErrors here too (the composites of src/ops have raised TypeErrors before). Values that live on the
// GPU are not looked at: that would stall the stream.
#pragma once
#include <initializer_list>
#include <ostream>
#include <span>
#include <sstream>
#include <stdexcept>

#include "ops/cuda/tensors.h"

namespace sparsek::ops::cuda {

template <class... Parts>
void check_value(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A tensor argument with the layout its documentation names.
struct Argument {
  const char* name;
  const Tensor& tensor;
  const char* layout;
};

// A tensor's sizes or strides, for a message. Made into text only when there is one: a call checks dozens of times.
struct ListText {
  const int64_t* values;
  size_t size;
};
std::ostream& operator<<(std::ostream& stream, const ListText& list);
ListText shape_text(const Tensor& tensor);
ListText strides_text(const Tensor& tensor);

void check_ndim(const Argument& argument, int64_t ndim);
// A call comes here when any of its tensors is on a GPU: the one that says where the others are to be must be, too.
void check_on_gpu(const Argument& argument);
// Launches count them in a dimension of 16 bits.
void check_lanes(const Argument& argument, int64_t batch, int64_t num_kv_heads);
// ndim, dtype, device, shape.
void check_tensor(const Argument& argument, std::span<const int64_t> wanted, ScalarType dtype, const Argument& like);
inline void check_tensor(const Argument& argument, std::initializer_list<int64_t> wanted, ScalarType dtype,
                         const Argument& like) {
  check_tensor(argument, std::span(wanted.begin(), wanted.size()), dtype, like);
}
void check_contiguous(const Argument& argument);
// Rows of head_dim as the copy engine reads them: contiguous, at multiples of 16 bytes.
void check_rows_of_16_bytes(const Argument& argument);
// The strides of such a tensor; where there is a single entry, one that the copy engine takes.
Strides row_strides(const Tensor& tensor);

// [batch, seqlen, num_kv_heads] float32 on a GPU.
void check_scores(const char* name, const Tensor& scores);
void check_window(int64_t window_size, int64_t num_sinks);
// Throws unless 1 <= topk and pool_size is absent, 0 or larger; returns the pool size in force.
int32_t check_selection(int64_t topk, std::optional<int64_t> pool_size);
// bfloat16 or float16.
DType check_half(const char* name, ScalarType dtype);
inline DType check_half(const Argument& argument) {
  return check_half(argument.name, argument.tensor.scalar_type());
}
int32_t checked_int32(const char* name, int64_t value);

// Documents, checked and copied to the device when they come from the CPU (which waits for the stream); null without.
struct Documents {
  MaybeTensor starts;
  const int32_t* cu_seqlens = nullptr;
  int32_t count = 1;

  Documents(const MaybeTensor& cu_seqlens, const Argument& like, int64_t batch, int64_t seqlen);
};

}  // namespace sparsek::ops::cuda
