// How a packed weight lies in memory; shared by pack.cc, which writes it, and the kernels, which read it.
//
// A tile is 16 output rows over the whole depth; tiles follow each other. Within a tile everything is 16 lanes wide,
// lane = output row, so a kernel loads weights of 16 outputs with one vector and never adds across lanes:
//   F32   [depth][16] float32
//   BF16  [depth / 2][16] pairs (k, k + 1)
//   Q4_1  per block of 32: 16 d, 16 m (float16), then 4 vectors of 16 32-bit words. Word of row r in vector v holds
//         elements 8v..8v+7: nibble i of its low half is element 8v + 2i, nibble i of the high half is 8v + 2i + 1.
//         Shifting by 4i thus brings a (k, k + 1) pair to the bottom of the two halves.
//   Q8_0  first 16 d per block for all blocks, padded to 64 bytes; then per block 8 vectors of 16 32-bit words. Word of
//         row r in vector v: bytes are elements 4v, 4v + 2, 4v + 1, 4v + 3 (each half again holds k and k + 1).
// depth is in_features rounded up to even; the padding is zero.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/quant.h"

namespace sparsek::cpu::packed {

inline constexpr int kTileRows = 16;
inline constexpr int kBlock = 32;  // elements in a Q4_1 or Q8_0 block
inline constexpr int kQ41BlockBytes = 320;
inline constexpr int kQ41Minimum = 32;  // offsets in the block
inline constexpr int kQ41Nibbles = 64;
inline constexpr int kQ80BlockBytes = 512;  // without d
inline constexpr int kQ80ScaleBytes = 32;

constexpr int64_t depth(int64_t in_features) {
  return (in_features + 1) / 2 * 2;
}
constexpr int64_t num_tiles(int64_t out_features) {
  return (out_features + kTileRows - 1) / kTileRows;
}
constexpr int64_t q80_scales_bytes(int64_t in_features) {
  return (in_features / kBlock * kQ80ScaleBytes + 63) / 64 * 64;
}

constexpr int64_t tile_bytes(WeightType type, int64_t in_features) {
  switch (type) {
    case WeightType::kF32:
      return depth(in_features) * kTileRows * 4;
    case WeightType::kBF16:
      return depth(in_features) * kTileRows * 2;
    case WeightType::kQ4_1:
      return in_features / kBlock * kQ41BlockBytes;
    case WeightType::kQ8_0:
      return q80_scales_bytes(in_features) + in_features / kBlock * kQ80BlockBytes;
    default:
      return 0;
  }
}

// Bit position of element i (0..7) in a Q4_1 word, of element i (0..3) in a Q8_0 word.
constexpr int q41_shift(int i) {
  return i % 2 * 16 + i / 2 * 4;
}
constexpr int q80_shift(int i) {
  return i % 2 * 16 + i / 2 * 8;
}

}  // namespace sparsek::cpu::packed
