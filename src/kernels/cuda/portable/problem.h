// What the portable attention kernels share: tile sizes, and the params struct with what is derived from it.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda::portable {

enum class Kernel : uint8_t { kForward, kQueryGradient, kKeyGradient };

// Query rows (positions x the group's heads) and keys of one step of a CTA of four warps, and how many buffers there
// are of what it streams. Registers (65,536 an SM, at most 255 a thread) set the number of CTAs on an SM, two at
// head_dim 128 and three at 64: one computes while another waits. Shared memory is kept below what so many leave each
// other on compute capability 8.0 (164 KB an SM) and below the 99 KB that a CTA can have on 8.6, 8.9 and 12.0. At
// head_dim 128:
//   forward         32 rows a warp: each fragment of K and V read from shared memory feeds two products, else reading
//                   them and not multiplying would be the limit. O and S take 192 registers. 80 KB.
//   query gradient  16 rows a warp, Q, dO and dQ in registers, K and V double-buffered. 78 KB.
//   key gradient    16 keys a warp, dK and dV in registers, Q and dO double-buffered. 99 KB: one CTA an SM on 8.x.
// Lists of any length fit because they are walked in rounds (far_rows.cuh).
struct TileShape {
  int rows, keys, stages;
};
constexpr TileShape tile_shape(Kernel kernel) {
  return kernel == Kernel::kForward ? TileShape{128, 64, 1} : TileShape{64, 64, 2};
}
constexpr int ctas_per_multiprocessor(int head_dim) {
  return head_dim == 64 ? 3 : 2;
}
constexpr int kThreads = 128;
constexpr int kKeys = 64;  // of every kernel's step
static_assert(tile_shape(Kernel::kForward).keys == kKeys && tile_shape(Kernel::kQueryGradient).keys == kKeys &&
              tile_shape(Kernel::kKeyGradient).keys == kKeys);

struct Problem {
  AttentionFwdParams fwd;
  LiveLists live;
  int32_t group, chunk, num_chunks;  // chunk: a multiple of positions_per_step
  int32_t positions_per_step;        // 64 / group
  uint32_t group_inverse;            // of 2^16, rounded up: see divide_row()
  float scale, scale_log2;           // of logits, and the same for powers of two
};

struct BwdProblem : Problem {
  const void* dout;
  Strides dout_strides;
  void *dq, *dk, *dv, *dq_far, *dk_far;  // contiguous; the far ones null without far rotary
  float *lse2, *delta;                   // [batch, num_heads, seqlen_q] lse in powers of two; <do, out> - dlse
  float *dk_sum, *dv_sum;                // [lanes, seqlen_k, head_dim] over the chunks so far, of far rows
  float *h_key, *h_query;                // [lanes, seqlen_k], [lanes, seqlen_q] eq. 10; null: not wanted
  const int32_t* blocks_before;          // [lanes, num_chunks + 1] blocks of 64 far rows in the lists before a chunk's
  int32_t* blocks_done;                  // [lanes]
  int32_t* next_item;                    // of the key gradient
  int32_t blocks_per_list;
};

// The kernels of one dtype: T is __nv_bfloat16 or __half.
template <class T>
void launch_forward(const Problem& problem, cudaStream_t stream);
template <class T>
void launch_query_gradient(const BwdProblem& problem, cudaStream_t stream);
template <class T>
void launch_key_gradient(const BwdProblem& problem, cudaStream_t stream);

}  // namespace sparsek::cuda::portable
