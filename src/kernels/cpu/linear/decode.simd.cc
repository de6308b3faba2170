// Few rows of x against packed weights: every packed byte is read once, from memory, and multiplied with all rows.
//
// float32 x: weights are expanded to float32 vectors and multiplied. bfloat16 x (AVX-512): the integers of Q4_1 and
// Q8_0 blocks are exact in bfloat16, so a table permutation turns nibbles straight into bfloat16 pairs, and d and m
// (m times the sum of x over the block) are applied once per block; nothing is rounded but the float32 sums.
#include "kernels/cpu/linear/expand.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

using packed::kTileRows;

// Rows that share one expansion of the weights, as far as registers go.
#if defined(SPARSEK_ISA_AVX512)
constexpr int kMaxRows = 8;
#elif defined(SPARSEK_ISA_AVX2)
constexpr int kMaxRows = 4;
#else
constexpr int kMaxRows = 2;
#endif
// Independent sums that one output is spread over: few rows alone would wait for the latency of each addition.
constexpr int num_chains(int rows) {
  return rows <= 2 ? 2 : 1;
}

template <int kRows>
SPARSEK_INLINE void tile_f32(const DecodeTask& task, int64_t tile, int64_t row, float* sums) {
  const float* x = static_cast<const float*>(task.x.data) + row * task.x.stride;
  const int64_t stride = task.x.stride;
  constexpr int kChains = kTileVecs == 1 ? num_chains(kRows) : 1;
  VecF even_sum[kRows][kTileVecs][kChains] = {}, odd_sum[kRows][kTileVecs][kChains] = {};
  const int64_t depth = packed::depth(task.weight.in_features);
  expand(task.weight, tile, 0, depth, [&](int64_t k, int c, int i, VecF even, VecF odd) {
    const int chain = i / 2 % kChains;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      even_sum[r][c][chain] += even * x[r * stride + k];
      odd_sum[r][c][chain] += odd * x[r * stride + k + 1];
    }
  });
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kTileVecs; ++c) {
      VecF sum = even_sum[r][c][0] + odd_sum[r][c][0];
      for (int chain = 1; chain < kChains; ++chain) sum += even_sum[r][c][chain] + odd_sum[r][c][chain];
      store(sums + r * kTileRows + c * kLanes, sum);
    }
  }
}

#if defined(SPARSEK_ISA_AVX512)

// bfloat16 of the 16 values that a nibble stands for, twice: the permutation looks at five bits, of which the upper one
// belongs to the next nibble.
SPARSEK_INLINE __m512i nibble_table(int first, int step, int wrap_from) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const int nibble = i % 16;
    const float value = static_cast<float>(first + step * (nibble < wrap_from ? nibble : nibble - 16));
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    table[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(table);
}

SPARSEK_INLINE VecF dot(VecF sum, __m512i weights, const BFloat16* x) {
  return dot_bf16(sum, VecBF{weights}, splat_pair(x));
}

template <int kRows>
SPARSEK_INLINE void tile_bf16(const DecodeTask& task, int64_t tile, int64_t row, float* sums) {
  const PackedWeight& weight = task.weight;
  const uint8_t* data = weight.data + tile * packed::tile_bytes(WeightType::kBF16, weight.in_features);
  const BFloat16* x = static_cast<const BFloat16*>(task.x.data) + row * task.x.stride;
  VecF sum[kRows][2] = {};
  const int64_t depth = packed::depth(weight.in_features);
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    prefetch_ahead<128>(data + k * kTileRows * 2);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i pairs = _mm512_loadu_si512(data + (k + 2 * i) * kTileRows * 2);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][i] = dot(sum[r][i], pairs, x + r * task.x.stride + k + 2 * i);
    }
  }
  if (k < depth) {
    const __m512i pairs = _mm512_loadu_si512(data + k * kTileRows * 2);
    for (int r = 0; r < kRows; ++r) sum[r][0] = dot(sum[r][0], pairs, x + r * task.x.stride + k);
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kTileRows, sum[r][0] + sum[r][1]);
}

template <int kRows>
SPARSEK_INLINE void tile_q4_1(const DecodeTask& task, int64_t tile, int64_t row, float* sums) {
  const PackedWeight& weight = task.weight;
  const uint8_t* block = weight.data + tile * packed::tile_bytes(WeightType::kQ4_1, weight.in_features);
  const int64_t num_blocks = weight.in_features / packed::kBlock, stride = task.x.stride;
  const BFloat16* x = static_cast<const BFloat16*>(task.x.data) + row * stride;
  const float* block_sums = task.block_sums + row * num_blocks;
  const __m512i table = nibble_table(0, 1, 16);
  constexpr int kChains = num_chains(kRows);
  VecF sum[kRows] = {};
  for (int64_t b = 0; b < num_blocks; ++b, block += packed::kQ41BlockBytes, x += packed::kBlock) {
    prefetch_ahead<packed::kQ41BlockBytes>(block);
    VecF q_dot_x[kRows][kChains] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i words = _mm512_loadu_si512(block + packed::kQ41Nibbles + v * 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i q = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * i), table);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          VecF& chain = q_dot_x[r][i % kChains];
          chain = dot(chain, q, x + r * stride + v * 8 + i * 2);
        }
      }
    }
    const VecF d = load_half(block), m = load_half(block + packed::kQ41Minimum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r] += m * block_sums[r * num_blocks + b];
      sum[r] += d * (kChains == 1 ? q_dot_x[r][0] : q_dot_x[r][0] + q_dot_x[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kTileRows, sum[r]);
}

// A byte is 16 times its signed high nibble plus its low nibble: two tables, two products.
template <int kRows>
SPARSEK_INLINE void tile_q8_0(const DecodeTask& task, int64_t tile, int64_t row, float* sums) {
  const PackedWeight& weight = task.weight;
  const uint8_t* scales = weight.data + tile * packed::tile_bytes(WeightType::kQ8_0, weight.in_features);
  const uint8_t* block = scales + packed::q80_scales_bytes(weight.in_features);
  const int64_t num_blocks = weight.in_features / packed::kBlock, stride = task.x.stride;
  const BFloat16* x = static_cast<const BFloat16*>(task.x.data) + row * stride;
  constexpr int kChains = num_chains(kRows);
  const __m512i low_table = nibble_table(0, 1, 16), high_table = nibble_table(0, 16, 8);
  VecF sum[kRows] = {};
  for (int64_t b = 0; b < num_blocks; ++b, block += packed::kQ80BlockBytes, x += packed::kBlock) {
    prefetch_ahead<packed::kQ80BlockBytes>(block);
    VecF low_dot_x[kRows][kChains] = {}, high_dot_x[kRows][kChains] = {};
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m512i words = _mm512_loadu_si512(block + v * 64);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i low = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8 * i), low_table);
        const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8 * i + 4), high_table);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const BFloat16* pair = x + r * stride + v * 4 + i * 2;
          low_dot_x[r][i % kChains] = dot(low_dot_x[r][i % kChains], low, pair);
          high_dot_x[r][i % kChains] = dot(high_dot_x[r][i % kChains], high, pair);
        }
      }
    }
    const VecF d = load_half(scales + b * packed::kQ80ScaleBytes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      for (int chain = 0; chain < kChains; ++chain) sum[r] += d * (low_dot_x[r][chain] + high_dot_x[r][chain]);
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kTileRows, sum[r]);
}

#endif

template <int kRows>
void tile_rows(const DecodeTask& task, int64_t tile, int64_t row) {
  alignas(64) float sums[kRows * kTileRows];
#if defined(SPARSEK_ISA_AVX512)
  if (task.x.dtype == DType::kBF16) {
    switch (task.weight.type) {
      case WeightType::kBF16:
        tile_bf16<kRows>(task, tile, row, sums);
        break;
      case WeightType::kQ4_1:
        tile_q4_1<kRows>(task, tile, row, sums);
        break;
      default:
        tile_q8_0<kRows>(task, tile, row, sums);
        break;
    }
  } else {
    tile_f32<kRows>(task, tile, row, sums);
  }
#else
  tile_f32<kRows>(task, tile, row, sums);
#endif
  for (int r = 0; r < kRows; ++r) {
    write_tile(task.output, task.weight.out_features, row + r, tile, sums + r * kTileRows);
  }
}

}  // namespace

void linear_decode(const DecodeTask& task) {
  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    for (int64_t row = 0; row < task.x.rows; row += kMaxRows) {
      switch (task.x.rows - row) {
        case 1:
          tile_rows<1>(task, tile, row);
          break;
#if !defined(SPARSEK_ISA_PORTABLE)
        case 2:
          tile_rows<2>(task, tile, row);
          break;
        case 3:
          tile_rows<3>(task, tile, row);
          break;
#endif
#if defined(SPARSEK_ISA_AVX512)
        case 4:
          tile_rows<4>(task, tile, row);
          break;
        case 5:
          tile_rows<5>(task, tile, row);
          break;
        case 6:
          tile_rows<6>(task, tile, row);
          break;
        case 7:
          tile_rows<7>(task, tile, row);
          break;
#endif
        default:
          tile_rows<kMaxRows>(task, tile, row);
          break;
      }
    }
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
