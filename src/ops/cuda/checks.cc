// See checks.h.
#include "ops/cuda/checks.h"

#include <algorithm>

namespace sparsek::ops::cuda {
namespace {

constexpr int64_t kMaxLength = int64_t{1} << 30;  // sums of two lengths stay inside 32 bits

struct DeviceText {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& stream, const DeviceText& device) {
  if (device.tensor.is_cpu()) return stream << "cpu";
  return stream << (device.tensor.is_cuda() ? "cuda:" : "device ") << int{device.tensor.get_device_index()};
}

DeviceText device_text(const Tensor& tensor) {
  return {tensor};
}

void check_dtype(const Argument& argument, ScalarType wanted) {
  const ScalarType found = argument.tensor.scalar_type();
  check_value(found == wanted, argument.name, " must be ", toString(wanted), ", got ", toString(found));
}

void check_device(const Argument& argument, const Argument& like) {
  check_on_gpu(like);
  check_value(argument.tensor.is_cuda() && argument.tensor.get_device_index() == like.tensor.get_device_index(),
              argument.name, " must be on ", device_text(like.tensor), " like ", like.name, ", got ",
              device_text(argument.tensor));
}

}  // namespace

std::ostream& operator<<(std::ostream& stream, const ListText& list) {
  stream << '[';
  for (size_t i = 0; i < list.size; ++i) stream << (i > 0 ? ", " : "") << list.values[i];
  return stream << ']';
}

ListText shape_text(const Tensor& tensor) {
  return {tensor.sizes().data(), tensor.sizes().size()};
}

ListText strides_text(const Tensor& tensor) {
  return {tensor.strides().data(), tensor.strides().size()};
}

void check_ndim(const Argument& argument, int64_t ndim) {
  check_value(argument.tensor.dim() == ndim, argument.name, " must be ", argument.layout, " (", ndim,
              " dimensions), got ", shape_text(argument.tensor));
}

void check_on_gpu(const Argument& argument) {
  check_value(argument.tensor.is_cuda(), argument.name, " must be on a GPU like other tensors of this call, got ",
              device_text(argument.tensor));
}

void check_lanes(const Argument& argument, int64_t batch, int64_t num_kv_heads) {
  constexpr int64_t kMaxLanes = 65535;
  check_value(batch <= kMaxLanes && num_kv_heads <= kMaxLanes && batch * num_kv_heads <= kMaxLanes,
              "batch times num_kv_heads must be at most ", kMaxLanes, " on a GPU, got ", argument.name, " with ", batch,
              " and ", num_kv_heads);
}

void check_tensor(const Argument& argument, std::span<const int64_t> wanted, ScalarType dtype, const Argument& like) {
  check_ndim(argument, static_cast<int64_t>(wanted.size()));
  check_dtype(argument, dtype);
  check_device(argument, like);
  const auto sizes = argument.tensor.sizes();
  check_value(std::equal(wanted.begin(), wanted.end(), sizes.begin()), argument.name, " must be ", argument.layout,
              " = ", ListText{wanted.data(), wanted.size()}, ", got ", shape_text(argument.tensor));
}

void check_contiguous(const Argument& argument) {
  check_value(argument.tensor.is_contiguous(), argument.name, " must be contiguous, got strides ",
              strides_text(argument.tensor));
}

void check_rows_of_16_bytes(const Argument& argument) {
  const Tensor& tensor = argument.tensor;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t last = sizes.size() - 1;
  const int64_t row_elements = 16 / static_cast<int64_t>(tensor.element_size());
  check_value(strides[last] == 1, argument.name, " must have a contiguous last dimension (stride 1), got strides ",
              strides_text(tensor));
  bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (size_t i = 0; i < last; ++i) {
    is_aligned = is_aligned && (sizes[i] == 1 || (strides[i] > 0 && strides[i] % row_elements == 0));
  }
  check_value(is_aligned, argument.name,
              " must have rows that lie at multiples of 16 bytes, none of them twice, on a GPU, got strides ",
              strides_text(tensor), " of ", tensor.element_size(), " bytes at address ", tensor.const_data_ptr());
}

Strides row_strides(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t head = sizes[2] > 1 ? strides[2] : sizes[3];
  const int64_t seq = sizes[1] > 1 ? strides[1] : sizes[2] * sizes[3];
  const int64_t batch = sizes[0] > 1 ? strides[0] : sizes[1] * sizes[2] * sizes[3];
  return {batch, seq, head};
}

void check_scores(const char* name, const Tensor& scores) {
  const Argument argument{name, scores, "[batch, seqlen, num_kv_heads]"};
  check_ndim(argument, 3);
  check_value(scores.scalar_type() == ScalarType::Float, name, " must be Float on a GPU, got ",
              toString(scores.scalar_type()));
  check_value(scores.numel() > 0, name, " must have at least one batch row, position and head, got ",
              shape_text(scores));
  check_value(scores.size(1) <= kMaxLength, name, " must have at most 2^30 positions, got ", shape_text(scores));
  check_on_gpu(argument);
  check_lanes(argument, scores.size(0), scores.size(2));
}

void check_window(int64_t window_size, int64_t num_sinks) {
  check_value(window_size >= 1 && window_size <= kMaxLength, "window_size must be between 1 and 2^30, got ",
              window_size);
  check_value(num_sinks >= 0 && num_sinks <= kMaxLength, "num_sinks must be between 0 and 2^30, got ", num_sinks);
}

int32_t check_selection(int64_t topk, std::optional<int64_t> pool_size) {
  check_value(topk >= 1 && topk <= kMaxLength / 4, "topk must be between 1 and 2^28, got ", topk);
  const int64_t pool = pool_size.value_or(std::max<int64_t>(4 * topk, 1024));
  check_value(pool == 0 || (pool > topk && pool <= kMaxLength),
              "pool_size must be 0 (no limit) or more than topk = ", topk, ", got ", pool);
  return static_cast<int32_t>(pool);
}

DType check_half(const char* name, ScalarType dtype) {
  check_value(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
              " must be BFloat16 or Half on a GPU, got ", toString(dtype));
  return dtype == ScalarType::BFloat16 ? DType::kBF16 : DType::kF16;
}

int32_t checked_int32(const char* name, int64_t value) {
  check_value(value >= 0 && value <= kMaxLength, name, " must be at most 2^30, got ", value);
  return static_cast<int32_t>(value);
}

Documents::Documents(const MaybeTensor& cu_seqlens, const Argument& like, int64_t batch, int64_t seqlen) {
  if (!given(cu_seqlens)) return;
  const Argument argument{"cu_seqlens", *cu_seqlens, "[num_documents + 1]"};
  check_ndim(argument, 1);
  check_dtype(argument, ScalarType::Int);
  if (!cu_seqlens->is_cpu()) check_device(argument, like);
  const int64_t last = cu_seqlens->size(0) - 1;
  check_value(last >= 1, "cu_seqlens must be [num_documents + 1] with at least one document, got ",
              shape_text(*cu_seqlens));
  check_value(batch == 1, like.name, " must have batch 1 with cu_seqlens, got ", shape_text(like.tensor));
  starts = as_contiguous(*cu_seqlens);
  if (starts->is_cpu()) {
    const int32_t* values = const_data<int32_t>(*starts);
    check_value(values[0] == 0, "cu_seqlens must start at 0, got ", values[0]);
    for (int64_t i = 0; i < last; ++i) {
      check_value(values[i] < values[i + 1], "cu_seqlens must increase, got ", values[i], " then ", values[i + 1],
                  " at index ", i + 1);
    }
    check_value(values[last] == seqlen, "cu_seqlens must end at seqlen = ", seqlen, ", got ", values[last]);
    starts = torch::stable::to(*starts, like.tensor.device());
  }
  this->cu_seqlens = const_data<int32_t>(*starts);
  count = checked_int32("documents", last);
}

}  // namespace sparsek::ops::cuda
