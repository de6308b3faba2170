// Row arrays of whole sequences: row r is position r, nothing is carried.
#include "kernels/cpu/select/visibility.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <vector>

#include "kernels/cpu/parallel.h"

namespace sparsek::cpu {
namespace {

// Positions [begin, end) of one document in one batch row.
struct Stretch {
  int64_t batch_row, document_begin, document_end, begin, end;
};

std::vector<Stretch> split(const VisibilityParams& params) {
  constexpr int64_t kPositionsPerJob = 2048;
  std::vector<Stretch> stretches;
  const auto add = [&](int64_t batch_row, int64_t document_begin, int64_t document_end) {
    for (int64_t begin = document_begin; begin < document_end; begin += kPositionsPerJob) {
      const int64_t end = std::min(begin + kPositionsPerJob, document_end);
      stretches.push_back({batch_row, document_begin, document_end, begin, end});
    }
  };
  if (params.cu_seqlens) {
    assert(params.batch == 1);
    for (int64_t d = 0; d < params.num_documents; ++d) add(0, params.cu_seqlens[d], params.cu_seqlens[d + 1]);
  } else {
    for (int64_t b = 0; b < params.batch; ++b) add(b, 0, params.seqlen);
  }
  return stretches;
}

// out[(b, h), i] = in[b, i, h] for a stretch's positions.
template <class T>
void to_head_major(const VisibilityParams& params, const Stretch& stretch, const void* in, const Strides& strides,
                   void* out) {
  if (!out) return;
  for (int64_t h = 0; h < params.num_kv_heads; ++h) {
    const T* from = static_cast<const T*>(in) + stretch.batch_row * strides.batch + h * strides.head;
    T* to = static_cast<T*>(out) + (stretch.batch_row * params.num_kv_heads + h) * params.seqlen;
    for (int64_t i = stretch.begin; i < stretch.end; ++i) to[i] = from[i * strides.seq];
  }
}

template <class T>
void make_rows(const VisibilityParams& params, const Stretch& stretch) {
  to_head_major<T>(params, stretch, params.scores, params.scores_strides, params.row_scores);
  to_head_major<T>(params, stretch, params.tau, params.tau_strides, params.row_tau);
  to_head_major<int32_t>(params, stretch, params.expiry, params.index_strides, params.far_end);
  to_head_major<int32_t>(params, stretch, params.frac_begin, params.index_strides, params.row_frac_begin);
  to_head_major<int32_t>(params, stretch, params.frac_end, params.index_strides, params.row_frac_end);
  // The caller may bring another selection than ours, and the gradient counts queries at both ends.
  for (int32_t* times : {params.row_frac_begin, params.row_frac_end}) {
    if (!times) continue;
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
      int32_t* const row = times + (stretch.batch_row * params.num_kv_heads + h) * params.seqlen;
      for (int64_t i = stretch.begin; i < stretch.end; ++i) row[i] = std::clamp(row[i], 0, params.seqlen);
    }
  }

  const auto document_end = static_cast<int32_t>(stretch.document_end);
  const int64_t sinks_end = std::min(stretch.document_begin + params.num_sinks, stretch.end);
  for (int64_t h = 0; h < params.num_kv_heads; ++h) {
    const int64_t row = (stretch.batch_row * params.num_kv_heads + h) * params.seqlen;
    for (int64_t i = stretch.begin; i < stretch.end; ++i) {
      if (params.far_begin) params.far_begin[row + i] = static_cast<int32_t>(i + params.window_size);
      if (params.far_end) params.far_end[row + i] = std::min(params.far_end[row + i], document_end);
    }
    for (int64_t i = stretch.begin; i < sinks_end; ++i) {
      if (params.row_scores) static_cast<T*>(params.row_scores)[row + i] = std::numeric_limits<T>::infinity();
      if (params.far_end) params.far_end[row + i] = document_end;
    }
  }
  if (!params.window_begin) return;
  int32_t* const window_begin = params.window_begin + stretch.batch_row * params.seqlen;
  for (int64_t i = stretch.begin; i < stretch.end; ++i) {
    window_begin[i] = static_cast<int32_t>(std::max(stretch.document_begin, i - params.window_size + 1));
  }
}

}  // namespace

void visibility(const VisibilityParams& params) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  const std::vector<Stretch> stretches = split(params);
  parallel_for(static_cast<int64_t>(stretches.size()), [&](int64_t j) {
    params.dtype == DType::kF64 ? make_rows<double>(params, stretches[j]) : make_rows<float>(params, stretches[j]);
  });
}

}  // namespace sparsek::cpu
