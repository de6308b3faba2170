// swiglu: see elementwise.h.
#include <cassert>

#include "kernels/cpu/elementwise/elementwise.h"
#include "kernels/cpu/elementwise/rows.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

SPARSEK_INLINE VecF silu_times(VecF gate, VecF up) {
  const VecF decay =
      exp(min(splat(88.0f), -gate));  // exp is unspecified above 88; min keeps a NaN of its second argument
  return gate / (decay + 1.0f) * up;
}

template <class T>
void swiglu_as(const SwigluParams& p) {
  for_rows(p.rows, p.ffn, [&](int64_t row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    int c = 0;
    for (; c + kLanes <= p.ffn; c += kLanes) {
      store_elements(out + c, silu_times(load_elements(gate + c), load_elements(up + c)));
    }
    if (c < p.ffn) {
      const int count = p.ffn - c;
      store_elements(out + c, silu_times(load_elements(gate + c, count), load_elements(up + c, count)), count);
    }
  });
}

}  // namespace

void swiglu(const SwigluParams& p) {
  assert(p.dtype == DType::kBF16 || p.dtype == DType::kF32);
  if (p.dtype == DType::kBF16) {
    swiglu_as<BFloat16>(p);
  } else {
    swiglu_as<float>(p);
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
