// One attention problem in two forms: as the reference wants it (positions) and as the kernels do (rows: the row model
// of kernels/params.h). A case may begin in the middle of its sequence: then what the reference computes for the
// queries from `chunk_begin` on is what the kernels must give for a chunk with carried rows. Rows that must not be read
// hold NaN.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "kernels/params.h"
#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"
#include "tests/support/poison.h"

namespace sparsek::test {

struct CaseOptions {
  std::string what;
  reference::Spec spec;
  bool far_rotary = false;
  ScoreKind scores = ScoreKind::kNormal;
  int64_t chunk_begin = 0;
  bool with_dlse = false;
  uint64_t seed = 1;
};

template <class T>
constexpr DType kDTypeOf = sizeof(T) == 8   ? DType::kF64
                           : sizeof(T) == 4 ? DType::kF32
                                            : DType::kBF16;
template <class T>
using ScoreOf = std::conditional_t<sizeof(T) == 8, double, float>;

// Inputs by position, rounded to T.
template <class T>
struct Case {
  explicit Case(const CaseOptions& options_) : options(options_), spec(options_.spec) {
    spec.precision = sizeof(T) == 8 ? reference::Precision::kFloat64 : reference::Precision::kFloat32;
    const int64_t q_size = spec.batch * spec.seqlen * spec.num_heads * spec.head_dim;
    const int64_t k_size = spec.batch * spec.seqlen * spec.num_kv_heads * spec.head_dim;
    const uint64_t seed = options.seed * 100;
    inputs.q = rounded(normal(q_size, seed + 1));
    inputs.k = rounded(normal(k_size, seed + 2));
    inputs.v = rounded(normal(k_size, seed + 3));
    if (options.far_rotary) {
      inputs.q_far = rounded(normal(q_size, seed + 4));
      inputs.k_far = rounded(normal(k_size, seed + 5));
    }
    inputs.scores = make_scores(options.scores, spec.batch, spec.seqlen, spec.num_kv_heads, seed + 6);
    dout = rounded(normal(q_size, seed + 7));
    if (options.with_dlse) dlse = round_to_f32(normal(spec.batch * spec.num_heads * spec.seqlen, seed + 8));
    const int64_t row = spec.num_heads * spec.head_dim;
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t i = 0; i < options.chunk_begin; ++i) {
        std::fill_n(dout.begin() + (b * spec.seqlen + i) * row, row, 0.0);
        for (int64_t h = 0; h < spec.num_heads && !dlse.empty(); ++h) {
          dlse[(b * spec.num_heads + h) * spec.seqlen + i] = 0;
        }
      }
    }
    selection = reference::select(inputs.scores, spec);
  }
  static Values rounded(const Values& values) {
    return sizeof(T) == 2 ? round_to_bf16(values) : sizeof(T) == 4 ? round_to_f32(values) : values;
  }
  int64_t score_index(int64_t b, int64_t position, int64_t kv_head) const {
    return (b * spec.seqlen + position) * spec.num_kv_heads + kv_head;
  }

  CaseOptions options;
  reference::Spec spec;
  reference::AttentionInputs inputs;
  Values dout, dlse;
  reference::Selection selection;
};

// The same as rows. Owns every buffer that the parameters point to.
template <class T>
struct Rows {
  using Score = ScoreOf<T>;

  explicit Rows(const Case<T>& c)
      : source(c),
        spec(c.spec),
        chunk_begin(c.options.chunk_begin),
        seqlen_q(spec.seqlen - chunk_begin),
        num_carried(carried()),
        seqlen_k(num_carried + seqlen_q),
        q(gather_queries(c.inputs.q)),
        k(spec.batch * seqlen_k * spec.num_kv_heads * spec.head_dim),
        v(k.size()),
        q_far(gather_queries(c.inputs.q_far)),
        k_far(c.options.far_rotary ? k.size() : 0),
        dout(gather_queries(c.dout)),
        dlse(gather_lse(c.dlse)),
        scores(spec.batch * spec.num_kv_heads * seqlen_k),
        tau(spec.batch * spec.num_kv_heads * seqlen_q),
        window_begin(spec.batch * seqlen_q),
        far_begin(scores.size()),
        far_end(scores.size()),
        out(q.size()),
        softmax_lse(spec.batch * spec.num_heads * seqlen_q),
        positions(scores.size(), -1) {
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t i = 0; i < seqlen_q; ++i) {
        const int64_t begin = std::max(document(i + chunk_begin).begin, i + chunk_begin - spec.window_size + 1);
        window_begin[b * seqlen_q + i] = static_cast<int32_t>(row_in_band(begin));
      }
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        for (int64_t i = 0; i < seqlen_q; ++i) {
          tau[(b * spec.num_kv_heads + h) * seqlen_q + i] =
              static_cast<Score>(c.selection.tau[c.score_index(b, i + chunk_begin, h)]);
        }
        place_rows(b, h);
      }
    }
    num_pool_rows = 0;
    for (const auto& pool : pool_positions) num_pool_rows = std::max<int64_t>(num_pool_rows, pool.size());
  }

  AttentionFwdParams forward() {
    AttentionFwdParams p{};
    p.dtype = kDTypeOf<T>;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    if (q_far.size() > 0) {
      p.q_far = q_far.data();
      p.k_far = k_far.data();
    }
    p.scores = scores.data();
    p.tau = tau.data();
    p.window_begin = window_begin.data();
    p.far_begin = far_begin.data();
    p.far_end = far_end.data();
    p.out = out.data();
    p.softmax_lse = softmax_lse.data();
    p.q_strides = p.q_far_strides = p.out_strides = strides(seqlen_q, spec.num_heads);
    p.k_strides = p.v_strides = p.k_far_strides = strides(seqlen_k, spec.num_kv_heads);
    p.batch = static_cast<int32_t>(spec.batch);
    p.seqlen_q = static_cast<int32_t>(seqlen_q);
    p.seqlen_k = static_cast<int32_t>(seqlen_k);
    p.num_carried = static_cast<int32_t>(num_carried);
    p.num_heads = static_cast<int32_t>(spec.num_heads);
    p.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
    p.head_dim = static_cast<int32_t>(spec.head_dim);
    p.gate = spec.gate;
    p.softmax_scale = spec.softmax_scale;
    return p;
  }

  // The queries' part of [batch, seqlen, num_heads, head_dim].
  std::vector<T> gather_queries(const Values& values) const {
    std::vector<T> result;
    if (values.empty()) return result;
    const int64_t row = spec.num_heads * spec.head_dim;
    for (int64_t b = 0; b < spec.batch; ++b) {
      const auto begin = values.begin() + (b * spec.seqlen + chunk_begin) * row;
      const std::vector<T> part = to_storage<T>(Values(begin, begin + seqlen_q * row));
      result.insert(result.end(), part.begin(), part.end());
    }
    return result;
  }
  std::vector<Score> gather_lse(const Values& values) const {
    std::vector<Score> result;
    for (int64_t row = 0; row < spec.batch * spec.num_heads && !values.empty(); ++row) {
      for (int64_t i = chunk_begin; i < spec.seqlen; ++i) {
        result.push_back(static_cast<Score>(values[row * spec.seqlen + i]));
      }
    }
    return result;
  }
  reference::Document document(int64_t position) const {
    for (const reference::Document& d : reference::documents(spec)) {
      if (position < d.end) return d;
    }
    return {};
  }

  const Case<T>& source;
  reference::Spec spec;
  int64_t chunk_begin, seqlen_q, num_carried, seqlen_k;
  Poisoned<T> q, k, v, q_far, k_far, dout;
  Poisoned<Score> dlse, scores, tau;
  Poisoned<int32_t> window_begin, far_begin, far_end;
  Poisoned<T> out;
  Poisoned<Score> softmax_lse;
  std::vector<int64_t> positions;                    // [batch, num_kv_heads, seqlen_k] -1: a row that no query sees
  std::vector<std::vector<int64_t>> pool_positions;  // [batch * num_kv_heads] in the pool, neither selected nor carried
  int64_t num_pool_rows = 0;

  static constexpr int64_t kUnusedRows = 3;  // carried rows that nothing sees, in front

 private:
  Strides strides(int64_t seqlen, int64_t heads) const {
    return {seqlen * heads * spec.head_dim, heads * spec.head_dim, spec.head_dim};
  }
  // [unused | slots: topk | sinks | ring: window_size], like the state of a stream.
  int64_t carried() const { return chunk_begin == 0 ? 0 : kUnusedRows + spec.topk + spec.num_sinks + spec.window_size; }
  int64_t row_in_band(int64_t position) const { return num_carried + position - chunk_begin; }

  void place_rows(int64_t b, int64_t h) {
    const int64_t first = (b * spec.num_kv_heads + h) * seqlen_k, w = spec.window_size;
    const reference::Selection& sel = source.selection;
    for (int64_t r = 0; r < seqlen_k; ++r) {
      scores[first + r] = 0;
      far_begin[first + r] = far_end[first + r] = 0;
    }
    std::vector<int64_t> slots;
    pool_positions.emplace_back();
    for (int64_t j = spec.num_sinks; j + w < chunk_begin; ++j) {
      const int64_t n = source.score_index(b, j, h);
      if (sel.expiry[n] >= chunk_begin && sel.expiry[n] > j + w) {
        slots.push_back(j);
      } else if (sel.frac_end[n] > chunk_begin) {
        pool_positions.back().push_back(j);
      }
    }
    // Query chunk_begin - 1 selected at most topk of these, and they are in the slots; more cannot have been seen then.
    EXPECT_LE(static_cast<int64_t>(slots.size()), std::max<int64_t>(spec.topk, 0));
    int64_t row = kUnusedRows;
    for (int64_t j : slots) place(b, h, first, row++, j);
    row = kUnusedRows + spec.topk;
    for (int64_t j = 0; j < std::min(spec.num_sinks, chunk_begin); ++j, ++row) {
      if (j + w < chunk_begin) place(b, h, first, row, j);
    }
    for (int64_t j = std::max<int64_t>(0, chunk_begin - w); j < spec.seqlen; ++j) place(b, h, first, row_in_band(j), j);
    for (int64_t r = 1; r < seqlen_k; ++r) {  // rows that are never far keep the order
      if (far_begin[first + r] < far_begin[first + r - 1]) {
        EXPECT_EQ(positions[first + r], -1);
        far_begin[first + r] = far_end[first + r] = far_begin[first + r - 1];
      }
    }
  }

  void place(int64_t b, int64_t h, int64_t first, int64_t row, int64_t position) {
    const int64_t n = source.score_index(b, position, h), w = spec.window_size;
    const reference::Document doc = document(position);
    const bool is_sink = position - doc.begin < spec.num_sinks;
    const int64_t begin = std::max<int64_t>(position + w - chunk_begin, 0);
    const int64_t end = std::max(begin, (is_sink ? doc.end : source.selection.expiry[n]) - chunk_begin);
    positions[first + row] = position;
    far_begin[first + row] = static_cast<int32_t>(begin);
    far_end[first + row] = static_cast<int32_t>(end);
    scores[first + row] =
        is_sink ? std::numeric_limits<Score>::infinity() : static_cast<Score>(source.inputs.scores[n]);
    const bool in_window = row >= row_in_band(std::max<int64_t>(0, chunk_begin - w + 1));
    for (int64_t c = 0; c < spec.head_dim; ++c) {
      const int64_t to = ((b * seqlen_k + row) * spec.num_kv_heads + h) * spec.head_dim + c;
      const int64_t from = n * spec.head_dim + c;
      const bool is_far = end > begin;
      if (in_window || (is_far && k_far.size() == 0)) k[to] = storage(source.inputs.k[from]);
      if (in_window || is_far) v[to] = storage(source.inputs.v[from]);
      if (is_far && k_far.size() > 0) k_far[to] = storage(source.inputs.k_far[from]);
    }
  }
  static T storage(double x) {
    if constexpr (sizeof(T) == 2) {
      return to_bf16(static_cast<float>(x));
    } else {
      return static_cast<T>(x);
    }
  }
};

}  // namespace sparsek::test
