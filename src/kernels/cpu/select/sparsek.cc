// The SparseK operator on the rows of a matrix (eq. 2).
#include <omp.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/select/rank.h"
#include "kernels/cpu/select/select.h"
#include "kernels/cpu/select/threshold.h"

namespace sparsek::cpu {
namespace {

template <class T>
void sparsek_typed(const SparsekParams& params) {
  struct Scratch {
    RankSorter<T> sorter;
    std::vector<Ranked<T>> sorted;
  };
  std::vector<Scratch> scratch(omp_get_max_threads());
  parallel_for(params.rows, [&](int64_t row) {
    auto& [sorter, sorted] = scratch[omp_get_thread_num()];
    const T* const z = static_cast<const T*>(params.z) + row * params.columns;
    T* const p = static_cast<T*>(params.p) + row * params.columns;
    sorted.resize(params.columns);
    for (int64_t i = 0; i < params.columns; ++i) {
      if (!std::isfinite(z[i])) throw_usage("sparsek: z must be finite, got {} at row {}, column {}", z[i], row, i);
      sorted[i] = {z[i] + T{0}, 0};
    }
    if (params.columns > params.k) sorter.sort(sorted.data(), params.columns);
    const Threshold threshold = sparsek_threshold([&](int64_t i) { return sorted[i].score; }, params.columns, params.k);
    const auto tau = static_cast<T>(threshold.tau);
    static_cast<T*>(params.tau)[row] = tau;
    for (int64_t i = 0; i < params.columns; ++i) p[i] = std::clamp<T>(z[i] - tau, 0, 1);
  });
}

}  // namespace

void sparsek(const SparsekParams& params) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  assert(params.k >= 1);
  params.dtype == DType::kF64 ? sparsek_typed<double>(params) : sparsek_typed<float>(params);
}

}  // namespace sparsek::cpu
