// What the two passes of window_mass share on Hopper: tiles of 128 rows and blocks of 128 rows in shared memory,
// multiplied by wgmma, 64 rows of the tile to a warpgroup. A warpgroup waits for its products and then takes their
// exponentials, which need the same time; two CTAs a multiprocessor. The two warpgroups of a CTA multiply in turn, so
// that one has the exponentials' unit while the other has the tensor cores; left alone both would want the same one.
//
// A turn is also what a block's copies are waited for with. In its turn n a warpgroup copies its part of block n + 1,
// multiplies block n, and passes the turn on once both are done. Whoever has turn n therefore finds all of block n, and
// block n - 1 multiplied by both. What a warpgroup reads beside the products, after its turn, must stay until its next.
#pragma once
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/window_mass/tiles.cuh"

namespace sparsek::cuda::mass::sm90 {

constexpr int kThreads = 256, kWarps = kThreads / 32, kWarpRows = 16, kStages = 2;
constexpr int kParts = kTileRows / kColumns;  // of a block, 16 columns each

template <class T, int kHeadDim>
struct Rows : RowCopy<T, kHeadDim, kThreads, kTileRows, true> {
  using Copy = RowCopy<T, kHeadDim, kThreads, kTileRows, true>;
  static constexpr int kSteps = kHeadDim / 16;

  // D[64, 128] = A B^T: this warpgroup's rows of a tile by a block. d[4 n + 2 h + e]: row 16 warp + lane / 4 + 8 h,
  // column 8 n + 2 (lane % 4) + e.
  static __device__ __forceinline__ void multiply(float (&d)[64], uint32_t tile, uint32_t block) {
    const ptx::Operand a(tile + threadIdx.x / 128 * 64 * 128, 16, 1024), b(block, 16, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t offset = step / 4 * Copy::kPanelBytes + step % 4 * 32;
      ptx::wgmma_ss<T, kTileRows>(d, a.at(offset), b.at(offset), step != 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  // D[16, 16] = A B^T by mma.sync: this warp's rows of a tile by rows [16 part, 16 part + 16) of a block; d as above.
  static __device__ __forceinline__ void multiply_part(float (&d)[8], uint32_t tile, uint32_t block, int part) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows + lane % 16,
              column = part * kColumns + (lane & 7) + (lane >> 4) * 8;
    float product[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4], b[4];
      ptx::load_matrix_x4(a, Copy::place(tile, row, 2 * step + lane / 16));
      ptx::load_matrix_x4(b, Copy::place(block, column, 2 * step + (lane >> 3 & 1)));
      ptx::mma_m16n8k16<T>(product[0], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(product[1], a, b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) d[n] = product[n / 4][n % 4];
  }
};

// cp.async's rows, before wgmma reads them: the reader needs the fence too (docs/decisions/hopper-attention.md, traps).
__device__ __forceinline__ void wait_for_copies() {
  ptx::copy_async_wait<0>();
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::fence_proxy_async();
}

// Named barriers 1 and 2: the turn of warpgroup 0 and of warpgroup 1. Warpgroup 0 begins; as many turns are passed on
// as are taken, so that the next loop finds the barriers as this one did. All threads of a warpgroup.
__device__ __forceinline__ void take_turn(int n) {
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 1 || n > 0) asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(kThreads) : "memory");
  ptx::fence_proxy_async();
}
__device__ __forceinline__ void pass_turn(bool is_last) {
  const int warpgroup = threadIdx.x / 128;
  ptx::copy_async_wait<0>();
  ptx::fence_proxy_async();
  if (warpgroup == 0 || !is_last) asm volatile("bar.arrive %0, %1;" ::"r"(2 - warpgroup), "n"(kThreads) : "memory");
}

}  // namespace sparsek::cuda::mass::sm90
