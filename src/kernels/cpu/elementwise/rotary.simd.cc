// rotary: see elementwise.h. A pair of vectors is loaded whole before either is stored, so `out` may be `x`.
#include <cassert>

#include "kernels/cpu/elementwise/elementwise.h"
#include "kernels/cpu/elementwise/rows.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

template <class T>
SPARSEK_INLINE void rotate_head(const T* x, T* out, const float* cos, const float* sin, int half) {
  int c = 0;
  for (; c + kLanes <= half; c += kLanes) {
    const VecF first = load_elements(x + c), second = load_elements(x + half + c);
    const VecF cosine = load(cos + c), sine = load(sin + c);
    store_elements(out + c, first * cosine - second * sine);
    store_elements(out + half + c, second * cosine + first * sine);
  }
  if (c < half) {
    const int count = half - c;
    const VecF first = load_elements(x + c, count), second = load_elements(x + half + c, count);
    const VecF cosine = load_elements(cos + c, count), sine = load_elements(sin + c, count);
    store_elements(out + c, first * cosine - second * sine, count);
    store_elements(out + half + c, second * cosine + first * sine, count);
  }
}

template <class T>
void rotary_as(const RotaryParams& p) {
  const size_t rest_bytes = sizeof(T) * (p.head_dim - p.rotary_dim);
  for_rows(p.tokens, int64_t{p.heads} * p.head_dim, [&](int64_t token) {
    const float* cos = p.cos + token * p.angle_stride;
    const float* sin = p.sin + token * p.angle_stride;
    const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride;
    for (int head = 0; head < p.heads; ++head, x += p.x_head_stride, out += p.out_head_stride) {
      rotate_head(x, out, cos, sin, p.rotary_dim / 2);
      if (rest_bytes > 0 && out != x) std::memcpy(out + p.rotary_dim, x + p.rotary_dim, rest_bytes);
    }
  });
}

}  // namespace

void rotary(const RotaryParams& p) {
  assert(p.dtype == DType::kBF16 || p.dtype == DType::kF32);
  assert(p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim);
  if (p.dtype == DType::kBF16) {
    rotary_as<BFloat16>(p);
  } else {
    rotary_as<float>(p);
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
