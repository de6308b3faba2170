// GGUF's block formats as float32, and float32 as Q8_0. The arithmetic (order of products, roundings) is that of GGUF's
// own decoder, so that results are equal to the bit; that needs no contraction to fused multiply-adds, which g++ and
// clang do not do here (-std=c++20 without extensions, no fma in the base instruction set).
//
// Every block starts or ends with float16 scales. Numbers of a format's fields: see each function.
#include "base/quant.h"

#include <cmath>
#include <cstring>

#include "base/bf16.h"

namespace sparsek {
namespace {

// Rounds to nearest even; overflow gives infinity.
uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  if (magnitude < 0x38800000u) {  // below 2^-14: float16 steps of 2^-24, which is the last bit of a float near 0.5
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// 32 elements: d, 16 bytes; byte i holds elements i (low nibble) and i + 16.
void block_q4_0(const uint8_t* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((block[2 + i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

// 32 elements: d, m, 16 bytes as in Q4_0.
void block_q4_1(const uint8_t* block, float* out) {
  const float d = half_at(block), m = half_at(block + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(block[4 + i] & 15) + m;
    out[i + 16] = d * static_cast<float>(block[4 + i] >> 4) + m;
  }
}

// 32 elements: d, 32 signed bytes.
void block_q8_0(const uint8_t* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * d;
}

// The 6-bit scale and minimum of sub-block `i` (of 8) from the 12 bytes that Q4_K and Q5_K share.
void scale_and_minimum(const uint8_t* packed, int i, int& scale, int& minimum) {
  if (i < 4) {
    scale = packed[i] & 63;
    minimum = packed[i + 4] & 63;
  } else {
    scale = (packed[i + 4] & 15) | ((packed[i - 4] >> 6) << 4);
    minimum = (packed[i + 4] >> 4) | ((packed[i] >> 6) << 4);
  }
}

// 256 elements: d, dmin, 12 bytes of scales, [Q5_K: 32 bytes of fifth bits,] 128 bytes of nibbles. Each 32 bytes of
// nibbles hold two sub-blocks of 32: the low nibbles, then the high ones; bit i of fifth-bit byte j belongs to element
// j of sub-block i.
template <bool kFifthBit>
void block_q4_k_q5_k(const uint8_t* block, float* out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  const uint8_t* scales = block + 4;
  const uint8_t* fifth_bits = block + 16;
  const uint8_t* nibbles = block + (kFifthBit ? 48 : 16);
  for (int sub = 0; sub < 8; ++sub) {
    int scale, minimum;
    scale_and_minimum(scales, sub, scale, minimum);
    const float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(minimum);
    for (int i = 0; i < 32; ++i) {
      int q = (nibbles[sub / 2 * 32 + i] >> (sub % 2 * 4)) & 15;
      if (kFifthBit) q |= ((fifth_bits[i] >> sub) & 1) << 4;
      out[sub * 32 + i] = step * static_cast<float>(q) - offset;
    }
  }
}

// 256 elements: 128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 signed scales (one per 16 elements), d. Each
// half of 128 elements uses 64 bytes of nibbles (quarters 0, 1 low; 2, 3 high) and 32 of bit pairs (one per quarter).
void block_q6_k(const uint8_t* block, float* out) {
  const float d = half_at(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, j = i % 32;
    const int low = (block[half * 64 + quarter % 2 * 32 + j] >> (quarter / 2 * 4)) & 15;
    const int high = (block[128 + half * 32 + j] >> (quarter * 2)) & 3;
    const float step = d * static_cast<float>(static_cast<int8_t>(block[192 + i / 16]));
    out[i] = step * static_cast<float>((low | (high << 4)) - 32);
  }
}

}  // namespace

void dequantise(WeightType type, const uint8_t* blocks, int64_t count, float* out) {
  const WeightLayout format = layout(type);
  if (type == WeightType::kF32) {
    std::memcpy(out, blocks, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count;
       i += format.block_elements, blocks += format.block_bytes, out += format.block_elements) {
    switch (type) {
      case WeightType::kF32:
        break;
      case WeightType::kF16:
        *out = half_at(blocks);
        break;
      case WeightType::kBF16: {
        BFloat16 x;
        std::memcpy(&x, blocks, 2);
        *out = to_float(x);
        break;
      }
      case WeightType::kQ4_0:
        block_q4_0(blocks, out);
        break;
      case WeightType::kQ4_1:
        block_q4_1(blocks, out);
        break;
      case WeightType::kQ8_0:
        block_q8_0(blocks, out);
        break;
      case WeightType::kQ4_K:
        block_q4_k_q5_k<false>(blocks, out);
        break;
      case WeightType::kQ5_K:
        block_q4_k_q5_k<true>(blocks, out);
        break;
      case WeightType::kQ6_K:
        block_q6_k(blocks, out);
        break;
    }
  }
}

void quantise_q8_0(const float* values, int64_t count, uint8_t* blocks) {
  for (int64_t begin = 0; begin < count; begin += 32, values += 32, blocks += 34) {
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::fmax(largest, std::fabs(values[i]));
    const float d = largest / 127.0f;
    const float inverse = d != 0 ? 1.0f / d : 0.0f;
    const uint16_t half = float_to_half(d);
    std::memcpy(blocks, &half, 2);
    for (int i = 0; i < 32; ++i) {
      const float q = std::round(values[i] * inverse);  // half away from zero; beyond 127 only if 1 / d overflows
      blocks[2 + i] = static_cast<uint8_t>(std::fabs(q) <= 127.0f ? static_cast<int8_t>(q) : int8_t{0});
    }
  }
}

}  // namespace sparsek
