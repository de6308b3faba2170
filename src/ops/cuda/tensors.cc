#include "ops/cuda/tensors.h"

#include <cassert>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

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

thread_local const char* current_operation = "an operation";

[[noreturn]] void throw_no_memory(const int64_t* sizes, size_t ndim, ScalarType dtype, int64_t bytes, int32_t device) {
  std::ostringstream message;
  message << "sparsek: " << current_operation << " could not allocate " << bytes << " bytes (" << toString(dtype) << ' '
          << ListText{sizes, ndim} << ") on cuda:" << device;
  size_t free_bytes = 0, total_bytes = 0;
  if (const cudaError_t error = cudaMemGetInfo(&free_bytes, &total_bytes); error == cudaSuccess)
    message << ", where " << free_bytes << " of " << total_bytes << " bytes are free besides what torch keeps";
  else
    message << " (CUDA: " << cudaGetErrorString(error) << ')';
  message << ". Fewer positions or batch rows a call, or a pool_size other than 0, need less; torch.cuda.empty_cache() "
             "gives back what torch keeps";
  throw std::runtime_error(message.str());
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
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype_code(dtype),
                               aoti_torch_device_type_cuda(), device, &handle) != AOTI_TORCH_SUCCESS) {
    const auto element_bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code(dtype)));
    throw_no_memory(sizes.data(), sizes.size(), dtype, stride * element_bytes, device);
  }
  return Tensor(handle);
}

OnDevice::OnDevice(const Tensor& tensor, const char* operation)
    : device_(tensor.get_device_index()),
      outer_operation_(std::exchange(current_operation, operation)),
      guard_(device_) {
  sparsek::cuda::check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

OnDevice::~OnDevice() {
  current_operation = outer_operation_;
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
