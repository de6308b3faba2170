// The warpgroup matrix product: sm_90a. Accumulators are float32, operands bf16 or fp16.
#pragma once
#include "kernels/cuda/ptx/instructions.cuh"

namespace sparsek::cuda::ptx {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An operand in a 128-byte swizzled tile; offsets in bytes. at() is one addition: the address field cannot overflow.
// The compiler must not see where `low` comes from, or it keeps every sum of a loop in registers.
struct Operand {
  uint32_t low, high;
  __device__ __forceinline__ Operand(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes)
      : low(((address & 0x3ffff) >> 4) | (leading_bytes >> 4 << 16)), high((stride_bytes >> 4) | (1u << 30)) {
    asm volatile("" : "+r"(low));
  }
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const { return (uint64_t{high} << 32) | (low + (bytes >> 4)); }
};

#define SPARSEK_ACC64(d)                                                                                      \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define SPARSEK_ACC64_LIST                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, "                                                                                                           \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

#define SPARSEK_ACC32(d)                                                                                      \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SPARSEK_ACC32_LIST                                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"

#define SPARSEK_WGMMA_SS_N128(type)                                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
               " " SPARSEK_ACC64_LIST ", %64, %65, p, 1, 1, 0, 0;\n}\n"                                               \
               : SPARSEK_ACC64(d)                                                                                     \
               : "l"(a), "l"(b), "r"(accumulate))
#define SPARSEK_WGMMA_SS_N64(type)                                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
               " " SPARSEK_ACC32_LIST ", %32, %33, p, 1, 1, 0, 0;\n}\n"                                              \
               : SPARSEK_ACC32(d)                                                                                    \
               : "l"(a), "l"(b), "r"(accumulate))
// D[64, kN] (+)= A[64, 16] B[kN, 16]^T, both in shared memory with K contiguous.
template <class Element, int kN>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kN == 64 || kN == 128);
  if constexpr (kN == 128 && kHalf)
    SPARSEK_WGMMA_SS_N128("f16");
  else if constexpr (kN == 128)
    SPARSEK_WGMMA_SS_N128("bf16");
  else if constexpr (kHalf)
    SPARSEK_WGMMA_SS_N64("f16");
  else
    SPARSEK_WGMMA_SS_N64("bf16");
}

#define SPARSEK_WGMMA_RS_N128(type)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " SPARSEK_ACC64_LIST \
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                        \
               : SPARSEK_ACC64(d)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define SPARSEK_WGMMA_RS_N64(type)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " SPARSEK_ACC32_LIST \
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                       \
               : SPARSEK_ACC32(d)                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// D[64, kN] += A[64, 16] B[16, kN], A in registers, B in shared memory with N contiguous.
template <class Element, int kN>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kN == 64 || kN == 128);
  if constexpr (kN == 128 && kHalf)
    SPARSEK_WGMMA_RS_N128("f16");
  else if constexpr (kN == 128)
    SPARSEK_WGMMA_RS_N128("bf16");
  else if constexpr (kHalf)
    SPARSEK_WGMMA_RS_N64("f16");
  else
    SPARSEK_WGMMA_RS_N64("bf16");
}

}  // namespace sparsek::cuda::ptx
