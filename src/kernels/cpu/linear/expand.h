// Packed tiles as float32 vectors, and results to y. Included by the *.simd.cc files of this folder only.
#pragma once
#include "base/bf16.h"
#include "kernels/cpu/linear/linear_kernels.h"
#include "kernels/cpu/linear/packed_layout.h"
#include "kernels/cpu/simd/vec.h"

namespace sparsek::cpu::SPARSEK_ISA {

inline constexpr int kTileVecs = packed::kTileRows / kLanes;

SPARSEK_INLINE VecU load_words(const uint8_t* p) {
  VecU x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// kLanes float16.
SPARSEK_INLINE VecF load_half(const uint8_t* p) {
#if defined(SPARSEK_ISA_AVX512)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(SPARSEK_ISA_AVX2)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_at(p + 2 * i);
  return x;
#endif
}

// The lowest four bits of every lane as a number.
SPARSEK_INLINE VecF nibble_to_float(VecU x) {
#if defined(SPARSEK_ISA_AVX512)
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (VecF)_mm512_permutexvar_ps((__m512i)x, table);
#else
  return __builtin_convertvector((VecI)(x & 15u), VecF);
#endif
}

// Asks for kBytes of what follows some blocks later. Weights come from memory once per call, and the processor's own
// prefetching loses the stream at every page: without this, two threads read Q8_0 at 23 GB/s instead of 39.
inline constexpr int kPrefetchDistance = 2048;
template <int kBytes>
SPARSEK_INLINE void prefetch_ahead(const uint8_t* p) {
#pragma GCC unroll 8
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + kPrefetchDistance + i);
}

// Calls sink(k, vec, i, even, odd) for every even k in [k_begin, k_end) and every vector of the tile's 16 rows: their
// weights at k and k + 1. i is k within a group of weights, a constant after unrolling. The bounds are multiples of 32
// or the end of the depth.
template <class Sink>
SPARSEK_INLINE void expand_f32(const uint8_t* tile, int64_t k_begin, int64_t k_end, Sink sink) {
  for (int64_t k = k_begin; k < k_end; k += 2) {
    prefetch_ahead<128>(tile + k * packed::kTileRows * 4);
    for (int c = 0; c < kTileVecs; ++c) {
      const uint8_t* from = tile + (k * packed::kTileRows + c * kLanes) * 4;
      sink(k, c, 0, (VecF)load_words(from), (VecF)load_words(from + packed::kTileRows * 4));
    }
  }
}

template <class Sink>
SPARSEK_INLINE void expand_bf16(const uint8_t* tile, int64_t k_begin, int64_t k_end, Sink sink) {
  for (int64_t k = k_begin; k < k_end; k += 2) {
    prefetch_ahead<64>(tile + k * packed::kTileRows * 2);
    for (int c = 0; c < kTileVecs; ++c) {
      const VecU pair = load_words(tile + (k * packed::kTileRows + c * kLanes * 2) * 2);
      sink(k, c, 0, (VecF)(pair << 16), (VecF)(pair & 0xffff0000u));
    }
  }
}

template <class Sink>
SPARSEK_INLINE void expand_q4_1(const uint8_t* tile, int64_t k_begin, int64_t k_end, Sink sink) {
  for (int64_t k = k_begin; k < k_end; k += packed::kBlock) {
    const uint8_t* block = tile + k / packed::kBlock * packed::kQ41BlockBytes;
    prefetch_ahead<packed::kQ41BlockBytes>(block);
    for (int c = 0; c < kTileVecs; ++c) {
      const VecF d = load_half(block + c * kLanes * 2);
      const VecF m = load_half(block + packed::kQ41Minimum + c * kLanes * 2);
      for (int v = 0; v < 4; ++v) {
        const VecU words = load_words(block + packed::kQ41Nibbles + v * 64 + c * kLanes * 4);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
          const VecF even = nibble_to_float(words >> packed::q41_shift(i));
          const VecF odd = nibble_to_float(words >> packed::q41_shift(i + 1));
          sink(k + v * 8 + i, c, i, even * d + m, odd * d + m);
        }
      }
    }
  }
}

template <class Sink>
SPARSEK_INLINE void expand_q8_0(const uint8_t* tile, int64_t in_features, int64_t k_begin, int64_t k_end, Sink sink) {
  const uint8_t* values = tile + packed::q80_scales_bytes(in_features);
  for (int64_t k = k_begin; k < k_end; k += packed::kBlock) {
    const int64_t block = k / packed::kBlock;
    prefetch_ahead<packed::kQ80BlockBytes>(values + block * packed::kQ80BlockBytes);
    for (int c = 0; c < kTileVecs; ++c) {
      const VecF d = load_half(tile + block * packed::kQ80ScaleBytes + c * kLanes * 2);
      for (int v = 0; v < 8; ++v) {
        const VecU words = load_words(values + block * packed::kQ80BlockBytes + v * 64 + c * kLanes * 4);
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {  // each byte to the top, then down again with its sign
          const VecI even = (VecI)(words << (24 - packed::q80_shift(i))) >> 24;
          const VecI odd = (VecI)(words << (24 - packed::q80_shift(i + 1))) >> 24;
          sink(k + v * 4 + i, c, i, __builtin_convertvector(even, VecF) * d, __builtin_convertvector(odd, VecF) * d);
        }
      }
    }
  }
}

template <class Sink>
SPARSEK_INLINE void expand(const PackedWeight& weight, int64_t tile, int64_t k_begin, int64_t k_end, Sink sink) {
  const uint8_t* data = weight.data + tile * packed::tile_bytes(weight.type, weight.in_features);
  switch (weight.type) {
    case WeightType::kF32:
      return expand_f32(data, k_begin, k_end, sink);
    case WeightType::kBF16:
      return expand_bf16(data, k_begin, k_end, sink);
    case WeightType::kQ4_1:
      return expand_q4_1(data, k_begin, k_end, sink);
    default:
      return expand_q8_0(data, weight.in_features, k_begin, k_end, sink);
  }
}

// Sums of one row over the 16 outputs of a tile, with bias and residual, to y.
SPARSEK_INLINE void write_tile(const LinearOutput& output, int64_t out_features, int64_t row, int64_t tile,
                               const float* sums) {
  const int64_t column = tile * packed::kTileRows;
  float* y_f32 = static_cast<float*>(output.y) + row * output.stride + column;
  BFloat16* y_bf16 = static_cast<BFloat16*>(output.y) + row * output.stride + column;
  const bool is_bf16 = output.dtype == DType::kBF16;
  if (column + packed::kTileRows <= out_features) {
#pragma GCC unroll 4
    for (int i = 0; i < packed::kTileRows; i += kLanes) {
      VecF sum = load(sums + i);
      if (output.bias != nullptr) sum += load(output.bias + column + i);
      if (output.add_to_y) sum += load(y_f32 + i);
      is_bf16 ? store_bf16(y_bf16 + i, sum) : store(y_f32 + i, sum);
    }
    return;
  }
  for (int64_t i = 0; i < out_features - column; ++i) {
    float sum = sums[i];
    if (output.bias != nullptr) sum += output.bias[column + i];
    if (output.add_to_y) sum += y_f32[i];
    if (is_bf16) {
      y_bf16[i] = to_bf16(sum);
    } else {
      y_f32[i] = sum;
    }
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
