#include "kernels/cpu/attention/score_gradient.h"

#include <vector>

namespace sparsek::cpu {

template <class Score>
void score_gradient(int64_t num_pool_rows, int64_t num_key_rows, int64_t num_queries, const int32_t* frac_begin,
                    const int32_t* frac_end, const double* h_sums, const double* row_h, Score* dscores) {
  const int64_t num_rows = num_pool_rows + num_key_rows;
  std::vector<int32_t> change(num_queries + 1, 0);  // of |F_i| from query to query
  for (int64_t r = 0; r < num_rows; ++r) {
    if (frac_begin[r] >= frac_end[r]) continue;
    ++change[frac_begin[r]];
    --change[frac_end[r]];
  }
  std::vector<double> mean_sum(num_queries + 1, 0.0);  // C
  int64_t num_fractional = 0;
  for (int64_t i = 0; i < num_queries; ++i) {
    num_fractional += change[i];
    mean_sum[i + 1] = mean_sum[i] + (num_fractional > 0 ? h_sums[i] / static_cast<double>(num_fractional) : 0.0);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const double h = r < num_pool_rows ? 0.0 : row_h[r - num_pool_rows];
    const bool empty = frac_begin[r] >= frac_end[r];
    dscores[r] = static_cast<Score>(empty ? 0.0 : h - (mean_sum[frac_end[r]] - mean_sum[frac_begin[r]]));
  }
}

template void score_gradient(int64_t, int64_t, int64_t, const int32_t*, const int32_t*, const double*, const double*,
                             float*);
template void score_gradient(int64_t, int64_t, int64_t, const int32_t*, const int32_t*, const double*, const double*,
                             double*);

}  // namespace sparsek::cpu
