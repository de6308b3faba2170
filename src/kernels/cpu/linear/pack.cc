// Repacking of GGUF blocks into tiles of 16 output rows (packed_layout.h), and single rows back out of them.
#include <cassert>
#include <cstring>

#include "base/bf16.h"
#include "kernels/cpu/linear/linear.h"
#include "kernels/cpu/linear/packed_layout.h"

namespace sparsek::cpu {
namespace {

using packed::kTileRows;

void pack_f32(const uint8_t* row, int64_t in_features, int lane, uint8_t* tile) {
  for (int64_t k = 0; k < packed::depth(in_features); ++k) {
    uint8_t* to = tile + (k * kTileRows + lane) * 4;
    k < in_features ? std::memcpy(to, row + k * 4, 4) : std::memset(to, 0, 4);
  }
}

void pack_bf16(const uint8_t* row, int64_t in_features, int lane, uint8_t* tile) {
  for (int64_t k = 0; k < packed::depth(in_features); ++k) {
    uint8_t* to = tile + ((k / 2 * kTileRows + lane) * 2 + k % 2) * 2;
    k < in_features ? std::memcpy(to, row + k * 2, 2) : std::memset(to, 0, 2);
  }
}

void pack_q4_1(const uint8_t* row, int64_t in_features, int lane, uint8_t* tile) {
  for (int64_t block = 0; block < in_features / packed::kBlock; ++block) {
    const uint8_t* from = row + block * 20;
    uint8_t* to = tile + block * packed::kQ41BlockBytes;
    std::memcpy(to + lane * 2, from, 2);
    std::memcpy(to + packed::kQ41Minimum + lane * 2, from + 2, 2);
    for (int v = 0; v < 4; ++v) {
      uint32_t word = 0;
      for (int i = 0; i < 8; ++i) {
        const int k = v * 8 + i;
        const uint32_t q = k < 16 ? from[4 + k] & 15u : from[4 + k - 16] >> 4;
        word |= q << packed::q41_shift(i);
      }
      std::memcpy(to + packed::kQ41Nibbles + v * 64 + lane * 4, &word, 4);
    }
  }
}

void pack_q8_0(const uint8_t* row, int64_t in_features, int lane, uint8_t* tile) {
  uint8_t* values = tile + packed::q80_scales_bytes(in_features);
  for (int64_t block = 0; block < in_features / packed::kBlock; ++block) {
    const uint8_t* from = row + block * 34;
    std::memcpy(tile + block * packed::kQ80ScaleBytes + lane * 2, from, 2);
    for (int v = 0; v < 8; ++v) {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i) word |= uint32_t{from[2 + v * 4 + i]} << packed::q80_shift(i);
      std::memcpy(values + block * packed::kQ80BlockBytes + v * 64 + lane * 4, &word, 4);
    }
  }
}

uint32_t word_at(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  return word;
}

void zero_lane(WeightType type, int64_t in_features, int lane, uint8_t* tile) {
  const int64_t words = packed::tile_bytes(type, in_features) / 64;
  if (type == WeightType::kF32 || type == WeightType::kBF16) {
    for (int64_t i = 0; i < words; ++i) std::memset(tile + i * 64 + lane * 4, 0, 4);
    return;
  }
  const uint8_t zeros[34] = {};
  for (int64_t block = 0; block < in_features / packed::kBlock; ++block) {
    if (type == WeightType::kQ4_1) {
      pack_q4_1(zeros, packed::kBlock, lane, tile + block * packed::kQ41BlockBytes);
    } else {
      std::memset(tile + block * packed::kQ80ScaleBytes + lane * 2, 0, 2);
      uint8_t* values = tile + packed::q80_scales_bytes(in_features) + block * packed::kQ80BlockBytes;
      for (int v = 0; v < 8; ++v) std::memset(values + v * 64 + lane * 4, 0, 4);
    }
  }
}

}  // namespace

size_t packed_size_bytes(WeightType type, int64_t out_features, int64_t in_features) {
  assert(can_pack(type) && out_features > 0 && in_features > 0 && in_features % layout(type).block_elements == 0);
  return static_cast<size_t>(packed::num_tiles(out_features) * packed::tile_bytes(type, in_features));
}

void pack_rows(WeightType type, int64_t out_features, int64_t in_features, int64_t row_begin, int64_t count,
               const uint8_t* blocks, uint8_t* destination) {
  assert(can_pack(type) && in_features % layout(type).block_elements == 0);
  assert(row_begin >= 0 && count >= 0 && row_begin + count <= out_features);
  assert(reinterpret_cast<uintptr_t>(destination) % kPackAlignment == 0);
  const int64_t row_bytes = in_features / layout(type).block_elements * layout(type).block_bytes;
  const int64_t tile_bytes = packed::tile_bytes(type, in_features);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = blocks + i * row_bytes;
    uint8_t* tile = destination + (row_begin + i) / kTileRows * tile_bytes;
    const int lane = static_cast<int>((row_begin + i) % kTileRows);
    switch (type) {
      case WeightType::kF32:
        pack_f32(row, in_features, lane, tile);
        break;
      case WeightType::kBF16:
        pack_bf16(row, in_features, lane, tile);
        break;
      case WeightType::kQ4_1:
        pack_q4_1(row, in_features, lane, tile);
        break;
      default:
        pack_q8_0(row, in_features, lane, tile);
        break;
    }
  }
  if (row_begin + count == out_features) {  // lanes past the last row are computed with and thrown away
    uint8_t* tile = destination + (out_features - 1) / kTileRows * tile_bytes;
    for (int64_t lane = (out_features - 1) % kTileRows + 1; lane < kTileRows; ++lane) {
      zero_lane(type, in_features, static_cast<int>(lane), tile);
    }
  }
}

void dequantise_row(const PackedWeight& weight, int64_t row, float* out) {
  assert(row >= 0 && row < weight.out_features);
  const int64_t in_features = weight.in_features;
  const uint8_t* tile = weight.data + row / kTileRows * packed::tile_bytes(weight.type, in_features);
  const int64_t lane = row % kTileRows;
  switch (weight.type) {
    case WeightType::kF32:
      for (int64_t k = 0; k < in_features; ++k) std::memcpy(&out[k], tile + (k * kTileRows + lane) * 4, 4);
      break;
    case WeightType::kBF16:
      for (int64_t k = 0; k < in_features; ++k) {
        BFloat16 x;
        std::memcpy(&x, tile + ((k / 2 * kTileRows + lane) * 2 + k % 2) * 2, 2);
        out[k] = to_float(x);
      }
      break;
    case WeightType::kQ4_1:
      for (int64_t block = 0; block < in_features / packed::kBlock; ++block) {
        const uint8_t* from = tile + block * packed::kQ41BlockBytes;
        const float d = half_at(from + lane * 2), m = half_at(from + packed::kQ41Minimum + lane * 2);
        for (int k = 0; k < packed::kBlock; ++k) {
          const uint32_t word = word_at(from + packed::kQ41Nibbles + k / 8 * 64 + lane * 4);
          *out++ = d * static_cast<float>((word >> packed::q41_shift(k % 8)) & 15) + m;
        }
      }
      break;
    case WeightType::kQ8_0:
      for (int64_t block = 0; block < in_features / packed::kBlock; ++block) {
        const float d = half_at(tile + block * packed::kQ80ScaleBytes + lane * 2);
        const uint8_t* from = tile + packed::q80_scales_bytes(in_features) + block * packed::kQ80BlockBytes;
        for (int k = 0; k < packed::kBlock; ++k) {
          const uint32_t word = word_at(from + k / 4 * 64 + lane * 4);
          *out++ = static_cast<float>(static_cast<int8_t>(word >> packed::q80_shift(k % 4))) * d;
        }
      }
      break;
    default:
      assert(false && "not a packed type");
  }
}

}  // namespace sparsek::cpu
