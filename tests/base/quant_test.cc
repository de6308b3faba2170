// GGUF's blocks against their definition written once more, from the element's side: where element k of a block finds
// its bits. (The Python tests compare with gguf's own decoder; this one runs without it, and under sanitizers.)
#include "base/quant.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/bf16.h"

namespace sparsek {
namespace {

float half(const uint8_t* p) {
  return half_to_float(static_cast<uint16_t>(p[0] | (p[1] << 8)));
}

// Bits [first, first + count) of a byte string, lowest bit first.
int bits(const uint8_t* p, int first, int count) {
  int value = 0;
  for (int i = 0; i < count; ++i) value |= ((p[(first + i) / 8] >> ((first + i) % 8)) & 1) << i;
  return value;
}

// Q4_K, Q5_K: 12 bytes of scales. Sub-blocks 0-3 have theirs in bytes 0-3 (minimum: 4-7), low six bits; sub-blocks 4-7
// have the low four bits in a nibble of bytes 8-11 and the high two on top of the byte that serves sub-block i - 4.
int k_scale(const uint8_t* p, int sub, bool minimum) {
  const int base = minimum ? 4 : 0;
  if (sub < 4) return bits(p + base + sub, 0, 6);
  return bits(p + 8 + sub - 4, minimum ? 4 : 0, 4) + 16 * bits(p + base + sub - 4, 6, 2);
}

float element(WeightType type, const uint8_t* block, int k) {
  switch (type) {
    case WeightType::kF32: {
      float x;
      std::memcpy(&x, block, 4);
      return x;
    }
    case WeightType::kF16:
      return half(block);
    case WeightType::kBF16:
      return to_float({static_cast<uint16_t>(block[0] | (block[1] << 8))});
    case WeightType::kQ4_0:
      return half(block) * static_cast<float>(bits(block + 2 + k % 16, k / 16 * 4, 4) - 8);
    case WeightType::kQ4_1: {
      const float scaled = half(block) * static_cast<float>(bits(block + 4 + k % 16, k / 16 * 4, 4));
      return scaled + half(block + 2);
    }
    case WeightType::kQ8_0: {
      const int q = block[2 + k];
      return half(block) * static_cast<float>(q < 128 ? q : q - 256);
    }
    case WeightType::kQ4_K:
    case WeightType::kQ5_K: {
      const bool has_fifth = type == WeightType::kQ5_K;
      const int sub = k / 32, j = k % 32;
      int q = bits(block + (has_fifth ? 48 : 16) + k / 64 * 32 + j, sub % 2 * 4, 4);
      if (has_fifth) q += 16 * bits(block + 16 + j, sub, 1);
      const float scale = half(block) * static_cast<float>(k_scale(block + 4, sub, false));
      const float minimum = half(block + 2) * static_cast<float>(k_scale(block + 4, sub, true));
      const float scaled = scale * static_cast<float>(q);
      return scaled - minimum;
    }
    case WeightType::kQ6_K: {
      const int upper = k / 128, in_half = k % 128;
      const int low = bits(block + upper * 64 + in_half % 64, in_half / 64 * 4, 4);
      const int high = bits(block + 128 + upper * 32 + in_half % 32, in_half / 32 * 2, 2);
      const int scale = block[192 + k / 16];
      const float step = half(block + 208) * static_cast<float>(scale < 128 ? scale : scale - 256);
      return step * static_cast<float>(low + 16 * high - 32);
    }
  }
  return NAN;
}

TEST(Quant, DequantisesEveryTypeToTheBit) {
  const uint32_t seed = 11;
  std::mt19937 rng(seed);
  for (WeightType type : {WeightType::kF32, WeightType::kF16, WeightType::kBF16, WeightType::kQ4_0, WeightType::kQ4_1,
                          WeightType::kQ8_0, WeightType::kQ4_K, WeightType::kQ5_K, WeightType::kQ6_K}) {
    const WeightLayout format = layout(type);
    const int num_blocks = 200;
    std::vector<uint8_t> blocks(static_cast<size_t>(num_blocks * format.block_bytes));
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(rng());
    std::vector<float> values(static_cast<size_t>(num_blocks * format.block_elements), NAN);
    dequantise(type, blocks.data(), static_cast<int64_t>(values.size()), values.data());
    for (int i = 0; i < static_cast<int>(values.size()); ++i) {
      const uint8_t* block = &blocks[static_cast<size_t>(i / format.block_elements * format.block_bytes)];
      const float wanted = element(type, block, i % format.block_elements);
      const float got = values[static_cast<size_t>(i)];
      if (std::isnan(wanted) && std::isnan(got)) continue;  // random scales are NaN now and then
      ASSERT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(wanted)) << format.name << " element " << i;
    }
  }
}

TEST(Quant, Q80RoundsHalfAwayFromZero) {
  std::vector<float> values(32, 0.0f);
  values[0] = 127.0f;  // d = 1
  values[1] = 2.5f;
  values[2] = -2.5f;
  values[3] = 3.4999f;
  values[4] = -126.5f;
  uint8_t block[34];
  quantise_q8_0(values.data(), 32, block);
  EXPECT_EQ(half(block), 1.0f);
  const int8_t wanted[] = {127, 3, -3, 3, -127, 0};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(static_cast<int8_t>(block[2 + i]), wanted[i]) << i;
}

TEST(Quant, Q80IsWithinHalfAStep) {
  std::mt19937 rng(12);
  std::normal_distribution<float> normal;
  for (float scale : {1e-9f, 1e-6f, 1e-3f, 1.0f, 1e4f}) {
    std::vector<float> values(32 * 64), decoded(32 * 64);
    for (float& value : values) value = scale * normal(rng);
    std::vector<uint8_t> blocks(34 * 64);
    quantise_q8_0(values.data(), 32 * 64, blocks.data());
    dequantise(WeightType::kQ8_0, blocks.data(), 32 * 64, decoded.data());
    for (size_t b = 0; b < 64; ++b) {
      float largest = 0;
      for (size_t i = 0; i < 32; ++i) largest = std::fmax(largest, std::fabs(values[b * 32 + i]));
      // Half a step, and the rounding of d to float16: 11 bits, or 2^-25 absolute for the smallest, times up to 127.
      const float limit = largest / 127 * 0.5001f + largest * 0x1p-11f + 127 * 0x1p-25f;
      for (size_t i = b * 32; i < b * 32 + 32; ++i) {
        ASSERT_TRUE(std::fabs(decoded[i] - values[i]) <= limit) << "scale " << scale << " element " << i;
      }
    }
  }
}

// Blocks whose 1 / d overflows, empty blocks, and values that are no numbers: defined, and zero or d-infinite.
TEST(Quant, Q80TakesAnyFloats) {
  std::vector<float> values(96, 0.0f);
  values[5] = 1e-44f;
  values[40] = std::numeric_limits<float>::infinity();
  values[70] = std::numeric_limits<float>::quiet_NaN();
  values[71] = 254.0f;
  uint8_t blocks[3 * 34];
  quantise_q8_0(values.data(), 96, blocks);
  for (int i = 0; i < 34; ++i) EXPECT_EQ(blocks[i], 0) << i;
  EXPECT_TRUE(std::isinf(half(blocks + 34)));
  EXPECT_EQ(half(blocks + 68), 2.0f);
  EXPECT_EQ(static_cast<int8_t>(blocks[68 + 2 + 7]), 127);
}

TEST(Quant, HalvesThatQ80Writes) {  // d = largest / 127 in float16: overflow, normal, subnormal, ties to even
  const auto d_of = [](float d) {
    std::vector<float> values(32, 0.0f);
    values[0] = d * 127;
    uint8_t block[34];
    quantise_q8_0(values.data(), 32, block);
    return half(block);
  };
  EXPECT_EQ(d_of(1024.0f), 1024.0f);
  EXPECT_EQ(d_of(2049.0f), 2048.0f);
  EXPECT_EQ(d_of(2051.0f), 2052.0f);
  EXPECT_EQ(d_of(65504.0f), 65504.0f);
  EXPECT_TRUE(std::isinf(d_of(65536.0f)));
  EXPECT_EQ(d_of(0x3p-24f), 0x3p-24f);
  EXPECT_EQ(d_of(0x1p-26f), 0.0f);
  EXPECT_EQ(d_of(0x3p-25f), 0x2p-24f);
  EXPECT_EQ(d_of(0x1p-14f), 0x1p-14f);
}

}  // namespace
}  // namespace sparsek
