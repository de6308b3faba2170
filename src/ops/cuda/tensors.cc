#include "ops/cuda/tensors.h"

#include <cassert>
#include <string>

#include "kernels/cuda/launch.h"
#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    default:
      assert(dtype == ScalarType::Byte && "no operation makes such a tensor");
      return aoti_torch_dtype_uint8();
  }
}

}  // namespace

// By the C function rather than the dispatcher: an attention makes a dozen of them.
Tensor empty(std::span<const int64_t> sizes, ScalarType dtype, int32_t device) {
  constexpr size_t kMostDimensions = 8;
  check_value(sizes.size() <= kMostDimensions, "expected at most ", kMostDimensions, " dimensions on a GPU, got ",
              sizes.size());
  int64_t strides[kMostDimensions] = {}, stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                  dtype_code(dtype), aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

OnDevice::OnDevice(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
  sparsek::cuda::check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Tensor OnDevice::workspace(int64_t bytes) const {
  return empty({bytes}, ScalarType::Byte, device_);
}

}  // namespace sparsek::ops::cuda

namespace torch::stable::detail {

sparsek::Gate ToImpl<sparsek::Gate>::call(StableIValue value, uint64_t, bool) {
  StringHandle handle = to<StringHandle>(value);
  const char* characters = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
  const std::string gate = characters;
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  using sparsek::ops::cuda::check_value;
  check_value(gate == "soft" || gate == "hard", "gate must be \"soft\" or \"hard\", got \"", gate, "\"");
  return gate == "hard" ? sparsek::Gate::kHard : sparsek::Gate::kSoft;
}

}  // namespace torch::stable::detail
