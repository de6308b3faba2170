// The inside of `far_lists` (ops/far_lists.h): rows | count | classes of kernels/cuda/live_rows.h, one after the other.
#pragma once
#include <algorithm>
#include <cassert>

#include "kernels/cuda/live_rows.h"
#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {

struct FarLists {
  int64_t num_lists, capacity, max_far;

  FarLists(int64_t lanes, int64_t seqlen_q, int64_t seqlen_k, int64_t max_far, int chunk)
      : num_lists(lanes * ((seqlen_q + chunk - 1) / chunk)),
        capacity(std::min(seqlen_k, max_far + chunk)),
        max_far(max_far) {}

  int64_t size() const { return num_lists * (4 * capacity + 3); }  // in int32 values

  sparsek::cuda::LiveLists in(const Tensor& tensor) const {
    assert(tensor.numel() >= size());
    auto* const rows = data<sparsek::cuda::LiveRow>(tensor);
    auto* const count = reinterpret_cast<int32_t*>(rows + num_lists * capacity);
    return {rows, count, count + num_lists, checked_int32("far rows of a list", capacity),
            checked_int32("max_far", max_far)};
  }
};

}  // namespace sparsek::ops::cuda
