// The vector type a *.simd.cc file computes with: as wide as the instruction set it is compiled for. Arithmetic
// (+ - * / comparisons) is the compiler's own on vector types; this header adds what it cannot say: loads, reductions,
// exp, bfloat16 conversion and the bfloat16 dot product.
//
// Everything sits in namespace sparsek::cpu::SPARSEK_ISA, so that the three builds of one inline function never meet
// in the linker. For the same reason a *.simd.cc file must not call non-trivial std:: templates.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(SPARSEK_ISA_AVX512) || defined(SPARSEK_ISA_AVX2)
#include <immintrin.h>
#endif

#include "base/bf16.h"

#define SPARSEK_INLINE inline __attribute__((always_inline))

namespace sparsek::cpu::SPARSEK_ISA {

#if defined(SPARSEK_ISA_AVX512)
inline constexpr int kLanes = 16;
#elif defined(SPARSEK_ISA_AVX2)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));  // kLanes bfloat16

SPARSEK_INLINE VecF splat(float x) {
  return x - VecF{};
}  // x - 0 keeps -0.0
SPARSEK_INLINE VecI splat_i(int32_t x) {
  return x - VecI{};
}
SPARSEK_INLINE VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
SPARSEK_INLINE void store(float* p, VecF x) {
  std::memcpy(p, &x, sizeof x);
}
SPARSEK_INLINE VecI load_i(const int32_t* p) {
  VecI x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
SPARSEK_INLINE VecF select(VecI mask, VecF yes, VecF no) {
  return mask ? yes : no;
}
SPARSEK_INLINE VecF max(VecF a, VecF b) {
#if defined(SPARSEK_ISA_AVX512)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SPARSEK_ISA_AVX2)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SPARSEK_INLINE VecF min(VecF a, VecF b) {
  return -max(-a, -b);
}
SPARSEK_INLINE float reduce_add(VecF x) {
#if defined(SPARSEK_ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}
SPARSEK_INLINE float reduce_max(VecF x) {
#if defined(SPARSEK_ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// kLanes bfloat16 <-> float32 (round to nearest even; finite inputs).
SPARSEK_INLINE VecF load_bf16(const BFloat16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
SPARSEK_INLINE void store_bf16(BFloat16* p, VecF x) {
#if defined(SPARSEK_ISA_AVX512)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &h, sizeof h);
#else
  const VecU bits = (VecU)x;
  const VecH h = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, VecH);
  std::memcpy(p, &h, sizeof h);
#endif
}

// 2 * kLanes bfloat16 as they lie in memory; dot_bf16 adds x[2i] y[2i] + x[2i+1] y[2i+1] to lane i.
struct VecBF {
#if defined(SPARSEK_ISA_AVX512)
  __m512i bits;
#else
  VecU bits;
#endif
};
SPARSEK_INLINE VecBF load_pairs(const BFloat16* p) {
  VecBF x;
  std::memcpy(&x.bits, p, sizeof x.bits);
  return x;
}
// One pair of bfloat16 in every lane.
SPARSEK_INLINE VecBF splat_pair(const BFloat16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
#if defined(SPARSEK_ISA_AVX512)
  return {_mm512_set1_epi32(static_cast<int>(pair))};
#else
  return {pair - VecU{}};
#endif
}
SPARSEK_INLINE VecF dot_bf16(VecF sum, VecBF x, VecBF y) {
#if defined(SPARSEK_ISA_AVX512)
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x.bits, (__m512bh)y.bits);
#else
  const VecF x_low = (VecF)(x.bits << 16), y_low = (VecF)(y.bits << 16);
  const VecF x_high = (VecF)(x.bits & 0xffff0000u), y_high = (VecF)(y.bits & 0xffff0000u);
  return sum + x_high * y_high + x_low * y_low;
#endif
}

// e^x with relative error below 2e-7 for x in [-87, 88]; 0 below -87 (and for -inf), unspecified above 88, NaN for NaN.
SPARSEK_INLINE VecF exp(VecF x) {
  const VecF clamped = max(splat(-87.0f), x);  // max returns its second argument for NaN
  const VecF scaled = clamped * 1.44269504088896341f;
#if defined(SPARSEK_ISA_AVX512)
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)scaled, 8);
#else
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  VecF shifted = scaled + magic;
  asm("" : "+x"(shifted));  // or the compiler may fold the two additions
  const VecF n = shifted - magic;
#endif
  const VecF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(SPARSEK_ISA_AVX512)
  const VecF result = (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VecF result = (VecF)((VecI)p + (__builtin_convertvector(n, VecI) << 23));
#endif
  return select((VecI)(x < -87.0f), splat(0.0f), result);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
