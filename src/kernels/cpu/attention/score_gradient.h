// Eq. 11: the gradient of the scores of one (batch row, KV head) from the sums that the kernels make of h (eq. 10).
#pragma once
#include <cstdint>

namespace sparsek::cpu {

// du_j = H_j - (C[frac_end_j] - C[frac_begin_j]), C the prefix sums of mbar_i = h_sums[i] / |F_i|; |F_i| is the number
// of rows whose interval holds i. Row r's H is row_h[r - num_pool_rows], and 0 for pool rows: they have no value.
template <class Score>
void score_gradient(int64_t num_pool_rows, int64_t num_key_rows, int64_t num_queries, const int32_t* frac_begin,
                    const int32_t* frac_end, const double* h_sums, const double* row_h, Score* dscores);

}  // namespace sparsek::cpu
