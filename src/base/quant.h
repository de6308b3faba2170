// Storage types of model weights: GGUF's block formats and plain floats.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsek {

enum class WeightType : uint8_t { kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };

struct WeightLayout {
  const char* name;
  int block_elements;
  int block_bytes;
};
constexpr WeightLayout layout(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return {"F32", 1, 4};
    case WeightType::kF16:
      return {"F16", 1, 2};
    case WeightType::kBF16:
      return {"BF16", 1, 2};
    case WeightType::kQ4_0:
      return {"Q4_0", 32, 18};
    case WeightType::kQ4_1:
      return {"Q4_1", 32, 20};
    case WeightType::kQ8_0:
      return {"Q8_0", 32, 34};
    case WeightType::kQ4_K:
      return {"Q4_K", 256, 144};
    case WeightType::kQ5_K:
      return {"Q5_K", 256, 176};
    case WeightType::kQ6_K:
      return {"Q6_K", 256, 210};
  }
  return {"?", 1, 1};
}
constexpr const char* name(WeightType type) {
  return layout(type).name;
}

// `count` values, a multiple of the block size, from their blocks (little endian, no alignment needed) to float32.
void dequantise(WeightType type, const uint8_t* blocks, int64_t count, float* out);
// float32 to Q8_0 blocks, as GGUF's own encoder rounds; count a multiple of 32.
void quantise_q8_0(const float* values, int64_t count, uint8_t* blocks);

}  // namespace sparsek
