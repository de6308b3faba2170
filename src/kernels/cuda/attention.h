// Attention on the GPU: eq. 7-9 and section 5 of docs/math.md. bfloat16 or float16; scores, tau, softmax_lse and
// dscores float32. Two sets of kernels serve it: sm90 (wgmma and TMA, devices of compute capability 9.0) and portable
// (mma.sync, 8.0 or later). A call runs on sm90 where sm90::serves_* says yes, else on portable: on a 9.0 device those
// are calls with more far rows than attention_max_far and backwards that must be deterministic, at about half the speed
// (docs/decisions/portable-attention.md). attention_kernel_set tells which.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/cuda/kernel_choice.h"
#include "kernels/cuda/live_rows.h"
#include "kernels/params.h"

namespace sparsek::cuda {

enum class KernelSet : uint8_t { kSm90, kPortable };
const char* name(KernelSet set);  // "sm90", "portable"

// Null where some set serves these on the current device, else what would be served, for an exception's text.
const char* attention_unsupported(DType dtype, int head_dim, int num_heads, int num_kv_heads);

// Which set serves a call.
KernelSet attention_kernel_set(const AttentionFwdParams& params, const LiveLists& live,
                               KernelChoice choice = KernelChoice::kAutomatic);
KernelSet attention_backward_kernel_set(const AttentionBwdParams& params, const LiveLists& live,
                                        KernelChoice choice = KernelChoice::kAutomatic);

// Queries per list of far rows that both sets want, for a group of num_heads / num_kv_heads query heads (at most 64).
int attention_chunk(int group);
// The most far rows per query (LiveLists::max_far) that a set takes; forward_only false: backward, or with far rotary.
int attention_max_far(KernelSet set, int group, bool forward_only);

// `live`: as select makes it. Rows of a batch row's q, k, v, out and their gradients are 16-byte aligned. A NaN in tau
// makes its rows NaN, and their gradients. So does, tile by tile, a query that sees more than live.max_far rows where
// the sm90 kernels have no room for them.
void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream,
                       KernelChoice choice = KernelChoice::kAutomatic);

// dscores null: not wanted. The workspace may hold anything.
int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live,
                                           KernelChoice choice = KernelChoice::kAutomatic);
void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream,
                        KernelChoice choice = KernelChoice::kAutomatic);

}  // namespace sparsek::cuda
