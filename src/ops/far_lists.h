// The size of `far_lists`: the lists of far rows that a GPU's tiles gather from (kernels/cuda/live_rows.h), one int32
// tensor whose inside only the CUDA kernels know. _select_rows makes it, _attention_rows and attention_backward read
// it; without it they make their own. It depends on shapes alone, so that meta tensors and CUDA graphs know it.
#pragma once
#include <cstdint>

namespace sparsek::ops {

// Queries per list; which number of these, a group of query heads decides (kernels/cuda/attention.h).
inline constexpr int64_t kLeastFarChunk = 896, kMostFarChunk = 1024;

// An upper bound in int32 values: 4 for each of at most max_far + chunk rows of a list, and 3 for the list itself.
template <class Int>
Int far_lists_size(const Int& batch, const Int& num_kv_heads, const Int& seqlen, int64_t max_far) {
  const Int num_lists = batch * num_kv_heads * ((seqlen + (kLeastFarChunk - 1)) / kLeastFarChunk);
  return num_lists * (4 * (max_far + kMostFarChunk) + 3);
}

}  // namespace sparsek::ops
