// A named tensor that lies in a mapped model file: what GGUF and safetensors files have in common.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/quant.h"

namespace sparsek {

struct WeightView {
  std::string name;
  WeightType type = WeightType::kF32;
  std::vector<int64_t> shape;      // outermost dimension first, as torch says it; the last one is contiguous
  std::span<const uint8_t> bytes;  // valid as long as the file object lives; no alignment beyond the file's own

  int64_t num_elements() const {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return count;
  }
};

// "[576, 1536]", for messages.
std::string shape_text(std::span<const int64_t> shape);

}  // namespace sparsek
