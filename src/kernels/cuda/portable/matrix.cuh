// Tensor-core products of compute capability 8.0 (mma.sync m16n8k16) and the shared-memory tiles they read.
//
// A tile is rows of kHeadDim two-byte elements; the 16-byte chunks of a row lie exchanged by the row's last three bits,
// so that eight rows' chunks of one column fall on different banks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/portable/problem.h"
#include "kernels/cuda/ptx/instructions.cuh"
#include "kernels/cuda/ptx/mma_sync.cuh"

namespace sparsek::cuda::portable {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The same number, but the compiler does not see that: what a loop derives from it is computed where it is used and
// not kept in registers over the whole loop. `zero`: a zero in shared memory.
__device__ __forceinline__ uint32_t hidden(uint32_t x, const uint32_t& zero) {
  return x ^ *const_cast<const volatile uint32_t*>(&zero);
}

// row / group for rows below 128 and groups of at most 64; inverse: Problem::group_inverse.
__device__ __forceinline__ int divide_row(int row, uint32_t inverse) {
  return static_cast<int>(static_cast<uint32_t>(row) * inverse >> 16);
}

template <int kHeadDim>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kHeadDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// Where a lane reads fragments of a tile. at(): `row16` counts 16 rows, `column16` 16 elements.
template <int kHeadDim>
struct Fragments {
  uint32_t base;
  __device__ __forceinline__ uint32_t at(int row16, int column16) const {
    return (base ^ (column16 << 5)) + row16 * (16 * kHeadDim * 2);
  }
  // A[16 rows, 16 columns] of the product, or (transposed) B[16 rows, 16 columns] as two n-tiles of 8 columns.
  static __device__ __forceinline__ Fragments rows(const void* tile, uint32_t lane) {
    return {ptx::shared_address(tile) + swizzled<kHeadDim>(lane & 15, lane >> 4)};
  }
  // B[16 columns, 16 rows] as two n-tiles of 8 rows: what multiplies the rows of a tile with those of another.
  static __device__ __forceinline__ Fragments columns(const void* tile, uint32_t lane) {
    return {ptx::shared_address(tile) + swizzled<kHeadDim>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1)};
  }
};

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&d)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[m][n][e] = 0;
    }
  }
}

// D[16 kM, 64] += A B^T over head_dim: A the rows of a tile from `a_row16` on, B the 64 rows of another.
template <class T, int kHeadDim, int kM>
__device__ __forceinline__ void multiply_rows(float (&d)[kM][8][4], const Fragments<kHeadDim>& a, int a_row16,
                                              const Fragments<kHeadDim>& b) {
#pragma unroll
  for (int column = 0; column < kHeadDim / 16; ++column) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::load_matrix_x4(left[m], a.at(a_row16 + m, column));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t right[4];
      ptx::load_matrix_x4(right, b.at(n, column));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(d[m][2 * n], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(d[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// The same for A[16, head_dim] in registers.
template <class T, int kHeadDim>
__device__ __forceinline__ void multiply_registers(float (&d)[8][4], const uint32_t (&a)[kHeadDim / 16][4],
                                                   const Fragments<kHeadDim>& b) {
#pragma unroll
  for (int column = 0; column < kHeadDim / 16; ++column) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t right[4];
      ptx::load_matrix_x4(right, b.at(n, column));
      ptx::mma_m16n8k16<T>(d[2 * n], a[column], right[0], right[1]);
      ptx::mma_m16n8k16<T>(d[2 * n + 1], a[column], right[2], right[3]);
    }
  }
}

// What lies in a lane as D[16, 64] becomes A[16, 64].
template <class T>
__device__ __forceinline__ void pack_rows(uint32_t (&a)[4][4], const float (&d)[8][4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    a[n][0] = ptx::pack<T>(d[2 * n][0], d[2 * n][1]), a[n][1] = ptx::pack<T>(d[2 * n][2], d[2 * n][3]);
    a[n][2] = ptx::pack<T>(d[2 * n + 1][0], d[2 * n + 1][1]), a[n][3] = ptx::pack<T>(d[2 * n + 1][2], d[2 * n + 1][3]);
  }
}

// D[16 kM, head_dim] += A[16 kM, 64] B: the 64 rows of a tile.
template <class T, int kHeadDim, int kM>
__device__ __forceinline__ void multiply_onto(float (&d)[kM][kHeadDim / 8][4], const uint32_t (&a)[kM][4][4],
                                              const Fragments<kHeadDim>& b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t right[4];
      ptx::load_matrix_x4_transposed(right, b.at(k, n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(d[m][2 * n], a[m][k], right[0], right[1]);
        ptx::mma_m16n8k16<T>(d[m][2 * n + 1], a[m][k], right[2], right[3]);
      }
    }
  }
}

// Copies rows into a tile, 16 bytes at a time. A thread copies the same columns of four rows in a row, then of four
// rows kPass further on: a few instructions a copy, because all addresses differ by constants and one 16-byte load
// gives what belongs to four rows.
template <int kHeadDim>
struct RowCopy {
  static constexpr uint32_t kChunks = kHeadDim / 8, kPass = kThreads / kChunks * 4, kRowBytes = kHeadDim * 2;
  const uint32_t first_row, column_bytes, offset;
  __device__ __forceinline__ explicit RowCopy(uint32_t thread)
      : first_row(thread / kChunks * 4),
        column_bytes(thread % kChunks * 16),
        offset(swizzled<kHeadDim>(thread / kChunks * 4, thread % kChunks)) {}
  // from(row): the address of the tile's row `row`; bytes(row): 16, or 0 for zeros.
  template <int kRows, class From, class Bytes>
  __device__ __forceinline__ void copy(void* tile, From from, Bytes bytes) const {
    const uint32_t to = ptx::shared_address(tile) + offset;
#pragma unroll
    for (uint32_t pass = 0; pass < kRows / kPass; ++pass) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t row = first_row + pass * kPass + j;
        ptx::copy_async_16_part((to ^ (j << 4)) + (pass * kPass + j) * kRowBytes, from(row, pass, j) + column_bytes,
                                bytes(row));
      }
    }
  }
};

// A warp's rows of D go out through rows of a tile that only this warp uses: a lane then stores 16 bytes.
// address_of(row of the 16): where that row begins, or null.
template <class T, int kHeadDim, class AddressOf>
__device__ __forceinline__ void store_rows(const float (&d)[kHeadDim / 8][4], float scale_low, float scale_high,
                                           uint8_t* tile, int first_row, int lane, AddressOf address_of) {
  const int row = first_row + lane / 4;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    uint8_t* const at = tile + swizzled<kHeadDim>(row, n) + lane % 4 * 4;
    *reinterpret_cast<uint32_t*>(at) = ptx::pack<T>(d[n][0] * scale_low, d[n][1] * scale_low);
    *reinterpret_cast<uint32_t*>(at + 8 * kHeadDim * 2) = ptx::pack<T>(d[n][2] * scale_high, d[n][3] * scale_high);
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / 8, kAtOnce = 32 / kChunks;
#pragma unroll 1
  for (int n = 0; n < 16 / kAtOnce; ++n) {
    const int r = lane / kChunks + n * kAtOnce, chunk = lane % kChunks;
    T* const to = address_of(r);
    if (to != nullptr) {
      *reinterpret_cast<uint4*>(to + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<kHeadDim>(first_row + r, chunk));
    }
  }
  __syncwarp();
}

}  // namespace sparsek::cuda::portable
