// Several neighbouring elements as one memory access, and the half types as template arguments.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "kernels/params.h"

namespace sparsek::cuda {

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(__half x) {
  return __half2float(x);
}
template <class T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Moved by accesses of its own size, at most 16 bytes. Stores are said to the machine: of plain ones the compiler cut
// some into four (seen in the machine code of swiglu_backward).
template <class T, int kWidth>
struct Pack {
  T at[kWidth];
};
template <int kBytes>
using Access =
    std::conditional_t<kBytes % 16 == 0, uint4,
                       std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <int kWidth, class T>
__device__ inline Pack<T, kWidth> load(const T* from) {
  constexpr int kBytes = sizeof(Pack<T, kWidth>), kAccesses = kBytes / sizeof(Access<kBytes>);
  Access<kBytes> parts[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) parts[i] = reinterpret_cast<const Access<kBytes>*>(from)[i];
  Pack<T, kWidth> pack;
  memcpy(&pack, parts, kBytes);
  return pack;
}
template <class T, int kWidth>
__device__ inline void store(T* to, const Pack<T, kWidth>& pack) {
  constexpr int kBytes = sizeof(Pack<T, kWidth>), kAccesses = kBytes / sizeof(Access<kBytes>);
  Access<kBytes> parts[kAccesses];
  memcpy(parts, &pack, kBytes);
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) __stwb(reinterpret_cast<Access<kBytes>*>(to) + i, parts[i]);
}

inline bool all_aligned(std::initializer_list<const void*> pointers, uintptr_t bytes) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;  // null is aligned
  }
  return true;
}
inline bool all_multiples(std::initializer_list<int64_t> values, int64_t of) {
  for (const int64_t value : values) {
    if (value % of != 0) return false;
  }
  return true;
}

// f(T()) for the half type.
template <class F>
void dispatch_half(DType dtype, F f) {
  if (dtype == DType::kBF16) {
    f(__nv_bfloat16());
  } else {
    f(__half());
  }
}

}  // namespace sparsek::cuda
