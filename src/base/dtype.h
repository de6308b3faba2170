// Element types of tensors that kernels read and write.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsek {

enum class DType : uint8_t { kF32, kBF16, kF16, kF64 };

constexpr size_t size_in_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kF16:
      return 2;
    case DType::kF64:
      return 8;
  }
  return 0;
}

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kF64:
      return "float64";
  }
  return "?";
}

}  // namespace sparsek
