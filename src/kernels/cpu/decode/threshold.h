// eq. 2 on scores that are already sorted, as decode keeps them.
#pragma once

namespace sparsek::cpu {

// tau of SparseK(scores, k): the largest root of sum_j clamp(scores_j - tau, 0, 1) = k, in double. `scores` descends
// and is finite; count > k >= 1. For float and double.
template <class Score>
double sorted_threshold(const Score* scores, int count, int k);

}  // namespace sparsek::cpu
