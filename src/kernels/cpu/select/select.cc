// Selection of whole sequences (eq. 3-6): documents and heads become lanes, lane times become query indices.
#include "kernels/cpu/select/select.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/select/finite.h"
#include "kernels/cpu/select/lane.h"

namespace sparsek::cpu {
namespace {

// Positions [begin, end) of one batch row. Its candidates are keys [first_key, first_key + num_candidates); candidate a
// arrives at query first_key + window_size + a.
struct Document {
  int64_t batch_row, begin, end, first_key, num_candidates;
};

std::vector<Document> split_documents(const SelectParams& params) {
  std::vector<Document> documents;
  const auto add = [&](int64_t batch_row, int64_t begin, int64_t end) {
    const int64_t num_candidates = end - begin - params.num_sinks - params.window_size;
    documents.push_back({batch_row, begin, end, begin + params.num_sinks, std::max<int64_t>(0, num_candidates)});
  };
  if (params.cu_seqlens) {
    assert(params.batch == 1);
    for (int64_t d = 0; d < params.num_documents; ++d) add(0, params.cu_seqlens[d], params.cu_seqlens[d + 1]);
  } else {
    for (int64_t b = 0; b < params.batch; ++b) add(b, 0, params.seqlen);
  }
  return documents;
}

// The lanes' results, [lane][candidate]. A key's three times stand in separate arrays.
template <class T>
struct LaneResults {
  explicit LaneResults(int64_t count)
      : tau(std::make_unique_for_overwrite<T[]>(count)),
        times(std::make_unique_for_overwrite<int32_t[]>(3 * count)),
        expiry(times.get()),
        frac_begin(expiry + count),
        frac_end(frac_begin + count) {}
  std::unique_ptr<T[]> tau;
  std::unique_ptr<int32_t[]> times;
  int32_t *expiry, *frac_begin, *frac_end;
};

// Writes the outputs of positions [begin, end) of a document, all heads. lane_start[h]: candidate 0 of its lane.
// Returns false where a score is not finite: lanes see candidates only, but a wrong sink or window key is wrong input
// too.
template <class T>
bool write_positions(const SelectParams& params, const Document& document, const LaneResults<T>& results,
                     const int64_t* lane_start, int64_t begin, int64_t end) {
  T* const tau = static_cast<T*>(params.tau);
  const T* const scores = static_cast<const T*>(params.scores);
  bool finite = true;
  const int64_t first_query = document.first_key + params.window_size;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = document.batch_row * params.out_strides.batch + i * params.out_strides.seq;
    const int64_t candidate = i - document.first_key, time = i - first_query;
    const auto leaves_window = static_cast<int32_t>(i + params.window_size);
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
      const int64_t out = row + h * params.out_strides.head;
      tau[out] = time >= 0 ? results.tau[lane_start[h] + time] : -std::numeric_limits<T>::infinity();
      finite &= std::isfinite(scores[document.batch_row * params.scores_strides.batch + i * params.scores_strides.seq +
                                     h * params.scores_strides.head]);
      int32_t expiry = leaves_window, frac_begin = leaves_window, frac_end = leaves_window;
      if (candidate >= 0 && candidate < document.num_candidates) {
        const int64_t key = lane_start[h] + candidate;
        expiry = static_cast<int32_t>(first_query + results.expiry[key]);
        if (results.frac_begin[key] < results.frac_end[key]) {
          frac_begin = static_cast<int32_t>(first_query + results.frac_begin[key]);
          frac_end = static_cast<int32_t>(first_query + results.frac_end[key]);
        }
      }
      params.expiry[out] = expiry;
      params.frac_begin[out] = frac_begin;
      params.frac_end[out] = frac_end;
    }
  }
  return finite;
}

template <class T>
void select_typed(const SelectParams& params) {
  const T* const scores = static_cast<const T*>(params.scores);
  const Strides& strides = params.scores_strides;
  const std::vector<Document> documents = split_documents(params);

  std::vector<int64_t> lane_starts;  // [document][head] into LaneResults
  int64_t num_results = 0;
  for (const Document& document : documents) {
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
      lane_starts.push_back(num_results);
      num_results += document.num_candidates;
    }
  }
  const LaneResults<T> results(num_results);
  std::vector<Lane<T>> lanes;
  for (size_t d = 0; d < documents.size(); ++d) {
    const Document& document = documents[d];
    if (document.num_candidates == 0) continue;
    for (int64_t h = 0; h < params.num_kv_heads; ++h) {
      const int64_t start = lane_starts[d * params.num_kv_heads + h];
      Lane<T>& lane = lanes.emplace_back();
      lane.scores = scores + document.batch_row * strides.batch + document.first_key * strides.seq + h * strides.head;
      lane.stride = strides.seq;
      lane.num_arrivals = document.num_candidates;
      lane.tau = results.tau.get() + start;
      lane.expiry = results.expiry + start;
      lane.frac_begin = results.frac_begin + start;
      lane.frac_end = results.frac_end + start;
    }
  }
  std::atomic<bool> finite = select_lanes<T>(lanes, params.topk, params.pool_size);

  constexpr int64_t kPositionsPerJob = 2048;
  struct Job {
    size_t document;
    int64_t begin, end;
  };
  std::vector<Job> jobs;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (int64_t begin = documents[d].begin; begin < documents[d].end; begin += kPositionsPerJob) {
      jobs.push_back({d, begin, std::min(begin + kPositionsPerJob, documents[d].end)});
    }
  }
  if (finite) {
    parallel_for(static_cast<int64_t>(jobs.size()), [&](int64_t j) {
      const Job& job = jobs[j];
      if (!write_positions(params, documents[job.document], results, &lane_starts[job.document * params.num_kv_heads],
                           job.begin, job.end)) {
        finite = false;
      }
    });
  }
  if (!finite) {
    throw_not_finite("scores", scores, strides, params.batch, params.seqlen, params.num_kv_heads,
                     [](int64_t, int64_t) { return true; });
  }
}

}  // namespace

void select(const SelectParams& params) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  assert(params.topk >= 1 && params.window_size >= 1 && params.num_sinks >= 0);
  params.dtype == DType::kF64 ? select_typed<double>(params) : select_typed<float>(params);
}

}  // namespace sparsek::cpu
