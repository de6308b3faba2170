// What the two passes of window_mass share: the problem, and products of 128 rows that stay in registers with blocks of
// 64 rows that pass through shared memory.
//
// Query rows are stacked: row position * group + g is query head g of the group at that position, so that all heads of
// a group read a key once. A block's 16-byte chunks lie exchanged by the row's last three bits: ldmatrix then meets
// every bank once.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels/cuda/ptx/instructions.cuh"
#include "kernels/cuda/ptx/mma_sync.cuh"
#include "kernels/params.h"

namespace sparsek::cuda::mass {

constexpr int kThreads = 128, kTileRows = 128, kWarpRows = kTileRows / (kThreads / 32);
constexpr int kBlockRows = 64, kColumns = 16, kStages = 3;  // kColumns: rows of a block in one product
constexpr float kLargestSum = 1e30f;  // of exponentials; beyond, a sum is taken again with a running maximum
static_assert(kTileRows == 2 * kBlockRows && kStages >= 2);

struct Problem {
  const void *q, *k, *q_far, *k_far;  // far: q and k where the caller gave none
  Strides q_strides, k_strides, q_far_strides, k_far_strides;
  const int32_t* window_begin;           // [batch, seqlen_q]
  const int32_t *far_begin, *far_end;    // [batch, seqlen_k]
  const float* mass_in;                  // [lanes, seqlen_k] or null
  float* mass;                           // [lanes, seqlen_k]
  float* lse2;                           // [lanes, seqlen_q * group] log2 of the sum of exp2 of logits by log2(e)
  int32_t* far_rows;                     // [batch, seqlen_k] the rows that some query sees as far, ascending
  int32_t* num_far;                      // [batch]
  int32_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, group, window_size;
  int32_t tile_positions, num_query_tiles, num_key_tiles;
  uint32_t group_inverse;  // 2^32 / group, rounded up
  float scale_log2;        // softmax_scale * log2(e), not 0
  float nothing;           // an infinity: the product whose exponential is 0
  bool has_far_rotary, has_even_groups;  // even: a group's heads fill a thread's step from row to row

  // x / group, for small x.
  __device__ __forceinline__ int by_group(int x) const {
    return group == 1 ? x : static_cast<int>(__umulhi(static_cast<uint32_t>(x), group_inverse));
  }
  __device__ __forceinline__ int clamped_window_begin(int64_t batch_row, int position) const {
    return min(max(window_begin[batch_row * seqlen_q + position], 0), num_carried + position);
  }
};

// A KV head of a batch row.
template <class T>
struct Lane {
  int64_t lane, b, h;
  __device__ Lane(const Problem& p, int64_t lane) : lane(lane), b(lane / p.num_kv_heads), h(lane % p.num_kv_heads) {}
  __device__ const T* keys(const void* base, const Strides& strides) const {
    return static_cast<const T*>(base) + b * strides.batch + h * strides.head;
  }
  __device__ const T* queries(const Problem& p, const void* base, const Strides& strides) const {
    return static_cast<const T*>(base) + b * strides.batch + h * p.group * strides.head;
  }
};

using Products = float[2][2][4];
constexpr int kProducts = 16;  // of a thread

// The place of product n of a thread among its four rows, and among its four columns.
__host__ __device__ constexpr int row_of(int n) { return n / 8 * 2 + n % 4 / 2; }
__host__ __device__ constexpr int column_of(int n) { return n / 4 % 2 * 2 + n % 2; }
// Volatile, to stay where it is put between products.
__device__ __forceinline__ float exp2_in_place(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies of blocks of kRows rows into shared memory by kThreads_ threads. Rows lie behind each other, or (kPanelled, as
// wgmma reads them) as panels of 64 elements of every row.
template <class T, int kHeadDim, int kThreads_, int kRows, bool kPanelled>
struct RowCopy {
  static constexpr int kChunks = kHeadDim / 8, kAtOnce = kThreads_ / kChunks, kPitch = kPanelled ? 128 : kHeadDim * 2,
                       kPanelBytes = kRows * 128, kBytes = kRows * kHeadDim * 2, kSteps = kHeadDim / 16;
  static_assert(kAtOnce % 8 == 0);  // all rows of a thread are exchanged alike

  static __device__ __forceinline__ uint32_t place(uint32_t block, int row, int chunk) {
    if constexpr (kPanelled) block += chunk / 8 * kPanelBytes, chunk %= 8;
    return block + row * kPitch + ((chunk ^ (row & 7)) << 4);
  }

  // Copies a block. A thread copies 16 bytes at the same column of every kAtOnce-th row, from its first_row() on.
  static __device__ __forceinline__ int first_row() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // else the compiler keeps what follows from it in registers, from copy to copy
    return thread / kChunks;
  }
  // Row `row` begins at address_of(row), or is zeros where that is null.
  template <class AddressOf>
  static __device__ __forceinline__ void copy(uint32_t block, AddressOf&& address_of) {
    const int first = first_row(), chunk = threadIdx.x % kChunks;
    const uint32_t to = place(block, first, chunk);
#pragma unroll 2
    for (int n = 0; n < kRows / kAtOnce; ++n) {
      const T* const from = address_of(first + n * kAtOnce);
      ptx::copy_async_16(to + n * kAtOnce * kPitch, from + chunk * 8, from != nullptr);
    }
  }
  // This thread's rows begin at `from` and each `step` elements after the one before; rows outside of [begin, end) are
  // zeros.
  static __device__ __forceinline__ void copy_steps(uint32_t block, int first, const T* from, int64_t step, int begin,
                                                    int end) {
    const int chunk = threadIdx.x % kChunks;
    const uint32_t to = place(block, first, chunk);
    from += chunk * 8;
    if (begin <= 0 && end >= kRows) {
#pragma unroll
      for (int n = 0; n < kRows / kAtOnce; ++n, from += step) ptx::copy_async_16(to + n * kAtOnce * kPitch, from);
    } else {
#pragma unroll 2
      for (int n = 0; n < kRows / kAtOnce; ++n, from += step) {
        const int row = first + n * kAtOnce;
        ptx::copy_async_16(to + n * kAtOnce * kPitch, from, row >= begin && row < end);
      }
    }
  }
  // Stacked query rows from head `head` at `position` on, up to position last_position.
  static __device__ __forceinline__ void copy_queries(const Problem& p, uint32_t block, const T* q,
                                                      const Strides& strides, int position, int head,
                                                      int last_position) {
    if (p.has_even_groups) {
      const int first = first_row(), later = p.by_group(head + first);
      const T* const from =
          q + (position + later) * strides.seq + (head + first - later * p.group) * strides.head;
      copy_steps(block, first, from, kAtOnce / p.group * strides.seq, 0,
                 (last_position - position + 1) * p.group - head);
    } else {
      copy(block, [&](int row) -> const T* {
        const int later = p.by_group(head + row);
        if (position + later > last_position) return nullptr;
        return q + (position + later) * strides.seq + (head + row - later * p.group) * strides.head;
      });
    }
  }
};

template <class T, int kHeadDim>
struct Rows : RowCopy<T, kHeadDim, kThreads, kBlockRows, false> {
  static constexpr int kPitch = kHeadDim * 2, kSteps = kHeadDim / 16;

  // This warp's rows of a tile that lies in two blocks.
  static __device__ __forceinline__ void load_tile(uint32_t (&a)[2][kSteps][4], uint32_t blocks) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows + lane % 16;
    const uint32_t from = blocks + row * kPitch + (((lane / 16) ^ (row & 7)) << 4);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        ptx::load_matrix_x4(a[m][step], (from ^ (step << 5)) + m * 16 * kPitch);
      }
    }
  }

  // D[32, 16] = A B^T: B is rows [16 part, 16 part + 16) of a block. d[m][n][e]: row 16 m + lane / 4 + 8 (e / 2) of A,
  // row 16 part + 8 n + 2 (lane % 4) + e % 2 of the block. beside(step), work that does not need them, is put between
  // the products: exponentials take as long as the tensor cores do, on other units.
  template <class Beside>
  static __device__ __forceinline__ void multiply(Products& d, const uint32_t (&a)[2][kSteps][4], uint32_t block,
                                                  int part, Beside&& beside) {
    const int lane = threadIdx.x % 32, row = (lane & 7) + (lane >> 4) * 8;
    uint32_t from = block + (part * kColumns + row) * kPitch + ((((lane >> 3) & 1) ^ (row & 7)) << 4);
    asm volatile("" : "+r"(from));  // else the compiler keeps the addresses of all steps in registers
#pragma unroll
    for (int n = 0; n < kProducts; ++n) d[n / 8][n / 4 % 2][n % 4] = 0;
    uint32_t b[2][4];
    ptx::load_matrix_x4(b[0], from);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) ptx::load_matrix_x4(b[(step + 1) % 2], from ^ ((step + 1) << 5));
      const uint32_t(&now)[4] = b[step % 2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma_m16n8k16<T>(d[m][0], a[m][step], now[0], now[1]);
        ptx::mma_m16n8k16<T>(d[m][1], a[m][step], now[2], now[3]);
      }
      beside(step);
    }
  }
};

// What masks need is read again each time: kept in registers through the products, it would not leave enough of them.
__device__ __forceinline__ void forget_shared_memory() {
  asm volatile("" ::: "memory");
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace sparsek::cuda::mass
