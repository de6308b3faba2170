// select against kernels/reference: kept sets, expiries and fractional intervals exactly, tau to docs/math.md
// section 8.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <type_traits>

#include "base/error.h"
#include "kernels/cpu/select/visibility.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::Precision;
using reference::Spec;

std::string describe(const Spec& spec, ScoreKind kind, uint64_t seed) {
  std::string documents;
  for (int64_t begin : spec.cu_seqlens) documents += fmt::format("{} ", begin);
  return fmt::format("scores {} seed {} B {} T {} H {} k {} w {} s {} m {} documents [{}]", name(kind), seed,
                     spec.batch, spec.seqlen, spec.num_kv_heads, spec.topk, spec.window_size, spec.num_sinks,
                     spec.pool_size, documents);
}

// The intervals that follow from the definition (fact c) and the tau that was returned.
template <class T>
void expect_intervals_follow_tau(const SelectResult<T>& result, const std::vector<T>& scores, const Spec& spec) {
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
      const auto at = [&](int64_t i) { return (b * spec.seqlen + i) * spec.num_kv_heads + h; };
      Values u(spec.seqlen);
      for (int64_t i = 0; i < spec.seqlen; ++i) u[i] = scores[at(i)];
      std::vector<int64_t> begin(spec.seqlen, -1), end(spec.seqlen, -1);
      reference::for_each_query(u, spec, [&](const reference::QuerySelection& query) {
        for (int64_t j : query.pool) {
          const T p = std::clamp<T>(scores[at(j)] - result.tau[at(query.query)], 0, 1);
          if (p <= 0 || p >= 1) continue;
          if (begin[j] < 0) begin[j] = query.query;
          end[j] = query.query + 1;
        }
      });
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        if (begin[j] < 0) begin[j] = end[j] = j + spec.window_size;
        ASSERT_EQ(result.frac_begin[at(j)], begin[j]) << "key " << j << " head " << h;
        ASSERT_EQ(result.frac_end[at(j)], end[j]) << "key " << j << " head " << h;
      }
    }
  }
}

template <class T>
void expect_equals_reference(const Values& values, Spec spec) {
  spec.precision = sizeof(T) == 8 ? Precision::kFloat64 : Precision::kFloat32;
  const std::vector<T> scores(values.begin(), values.end());
  const SelectResult<T> actual = run_select(scores, spec);
  const reference::Selection expected = reference::select(values, spec);
  EXPECT_ALL_EQUAL(actual.expiry, expected.expiry);
  EXPECT_ELEMENTS_CLOSE(actual.tau, expected.tau, sizeof(T) == 8 ? 1e-12 : 1e-6);
  expect_intervals_follow_tau(actual, scores, spec);
  // Where tau is the reference's to the bit the intervals are its own too.
  if (all_equal(actual.tau, expected.tau)) {
    EXPECT_ALL_EQUAL(actual.frac_begin, expected.frac_begin);
    EXPECT_ALL_EQUAL(actual.frac_end, expected.frac_end);
  }
}

TEST(Select, EqualsReferenceOnSmallCases) {
  std::mt19937_64 engine(1);
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    const ScoreKind kind = kAllScoreKinds[seed % std::size(kAllScoreKinds)];
    const Spec spec = random_spec(engine, 80, 1, 41);
    SCOPED_TRACE(describe(spec, kind, seed));
    const Values scores = make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed);
    seed % 5 ? expect_equals_reference<float>(scores, spec) : expect_equals_reference<double>(scores, spec);
    if (HasFailure()) return;
  }
}

// Several stretches: the pools of their starts, the walk inside and the seams.
TEST(Select, EqualsReferenceAcrossStretches) {
  uint64_t seed = 100;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t pool_size : {0, 33, 300}) {
      Spec spec;
      spec.seqlen = 2500 + static_cast<int64_t>(seed % 7) * 111;
      spec.num_kv_heads = 1;
      spec.topk = pool_size == 300 ? 64 : 21;
      spec.window_size = 17;
      spec.num_sinks = static_cast<int64_t>(seed % 3);
      spec.pool_size = pool_size;
      SCOPED_TRACE(describe(spec, kind, seed));
      const Values scores = make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed);
      expect_equals_reference<float>(scores, spec);
      expect_equals_reference<double>(scores, spec);
      ++seed;
      if (HasFailure()) return;
    }
  }
}

TEST(Select, TauNeverFallsAndAConstantChangesNothing) {
  Spec spec;
  spec.seqlen = 9000;
  spec.topk = 200;
  spec.window_size = 50;
  spec.pool_size = 900;
  for (const double std : {0.05, 1.0, 3.0}) {
    Values scores = normal(spec.seqlen, 7, std);
    for (double& score : scores) score = std::round(score * 4096) / 4096;
    const SelectResult<float> result = run_select(to_f32(scores), spec);
    for (int64_t i = 1; i < spec.seqlen; ++i) ASSERT_GE(result.tau[i], result.tau[i - 1]) << i;
    for (double& score : scores) score += 8;  // exact: 13 fractional bits and 4 before them
    const SelectResult<float> shifted = run_select(to_f32(scores), spec);
    EXPECT_ALL_EQUAL(shifted.expiry, result.expiry);
  }
}

TEST(Select, MinusZeroTiesWithZero) {
  Spec spec;
  spec.seqlen = 6;
  spec.topk = 1;
  const SelectResult<float> result = run_select<float>({-0.0f, 0.0f, -0.0f, 0.0f, 0.0f, 0.0f}, spec);
  EXPECT_EQ(result.expiry, (std::vector<int32_t>{6, 2, 3, 4, 5, 6}));  // the first of the ties stays
}

TEST(Select, StridesAreFree) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 700;
  spec.num_kv_heads = 3;
  spec.topk = 9;
  spec.window_size = 5;
  spec.pool_size = 40;
  const Values values = make_scores(ScoreKind::kNormal, 2, 700, 3, 3);
  const SelectResult<float> expected = run_select(to_f32(values), spec);
  // Scores lie [head, seq, batch], outputs [seq, head, batch].
  std::vector<float> scores(values.size(), std::numeric_limits<float>::quiet_NaN());
  std::vector<float> tau(values.size());
  std::vector<int32_t> expiry(values.size()), frac_begin(values.size()), frac_end(values.size());
  const auto from = [](int64_t b, int64_t i, int64_t h) { return (b * 700 + i) * 3 + h; };
  SelectParams params{};
  params.dtype = DType::kF32;
  params.scores = scores.data();
  params.tau = tau.data();
  params.expiry = expiry.data();
  params.frac_begin = frac_begin.data();
  params.frac_end = frac_end.data();
  params.scores_strides = {1, 2, 1400};
  params.out_strides = {1, 6, 2};
  params.batch = 2;
  params.seqlen = 700;
  params.num_kv_heads = 3;
  params.topk = 9;
  params.window_size = 5;
  params.pool_size = 40;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t i = 0; i < 700; ++i) {
      for (int64_t h = 0; h < 3; ++h) scores[b + 2 * i + 1400 * h] = static_cast<float>(values[from(b, i, h)]);
    }
  }
  cpu::select(params);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t i = 0; i < 700; ++i) {
      for (int64_t h = 0; h < 3; ++h) {
        const int64_t out = b + 6 * i + 2 * h, want = from(b, i, h);
        ASSERT_EQ(tau[out], expected.tau[want]);
        ASSERT_EQ(expiry[out], expected.expiry[want]);
        ASSERT_EQ(frac_begin[out], expected.frac_begin[want]);
        ASSERT_EQ(frac_end[out], expected.frac_end[want]);
      }
    }
  }
}

TEST(Select, RepeatsAreIdentical) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 5000;
  spec.num_kv_heads = 2;
  spec.topk = 100;
  spec.window_size = 30;
  spec.pool_size = 400;
  const std::vector<float> scores = to_f32(make_scores(ScoreKind::kNormalSmall, 2, 5000, 2, 4));
  const SelectResult<float> first = run_select(scores, spec);
  for (int repeat = 0; repeat < 20; ++repeat) {
    const SelectResult<float> again = run_select(scores, spec);
    EXPECT_EQ(first.tau, again.tau);
    EXPECT_EQ(first.expiry, again.expiry);
    EXPECT_EQ(first.frac_begin, again.frac_begin);
    EXPECT_EQ(first.frac_end, again.frac_end);
  }
}

TEST(Select, NamesTheScoreThatIsNotFinite) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 40;
  spec.num_kv_heads = 3;
  spec.num_sinks = 1;
  for (const int64_t position : {0, 17, 39}) {  // a sink, a candidate, a key that never leaves the window
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
      std::vector<float> scores(240, 0.5f);
      scores[(1 * 40 + position) * 3 + 2] = bad;
      std::string message;
      try {
        run_select(scores, spec);
      } catch (const DataError& error) {
        message = error.what();
      }
      EXPECT_EQ(message,
                fmt::format("scores must be finite, got {} at batch row 1, position {}, head 2", bad, position));
    }
  }
}

TEST(Visibility, RowsAreTheReferenceSets) {
  std::mt19937_64 engine(5);
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const ScoreKind kind = kAllScoreKinds[seed % std::size(kAllScoreKinds)];
    Spec spec = random_spec(engine, 60, 1, 31);
    SCOPED_TRACE(describe(spec, kind, seed));
    const Values values = make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed);
    const std::vector<float> scores = to_f32(values);
    const SelectResult<float> selected = run_select(scores, spec);
    const auto size = static_cast<int64_t>(scores.size());
    Poisoned<float> row_scores(size), row_tau(size);
    Poisoned<int32_t> window_begin(spec.batch * spec.seqlen), far_begin(size), far_end(size), frac_begin(size),
        frac_end(size);
    const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
    VisibilityParams params{};
    params.dtype = DType::kF32;
    params.scores = scores.data();
    params.tau = selected.tau.data();
    params.expiry = selected.expiry.data();
    params.frac_begin = selected.frac_begin.data();
    params.frac_end = selected.frac_end.data();
    params.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    params.scores_strides = params.tau_strides = params.index_strides = contiguous(spec.seqlen, spec.num_kv_heads);
    params.row_scores = row_scores.data();
    params.row_tau = row_tau.data();
    params.window_begin = window_begin.data();
    params.far_begin = far_begin.data();
    params.far_end = far_end.data();
    params.row_frac_begin = frac_begin.data();
    params.row_frac_end = frac_end.data();
    params.batch = static_cast<int32_t>(spec.batch);
    params.seqlen = static_cast<int32_t>(spec.seqlen);
    params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
    params.num_documents = cu_seqlens.empty() ? 0 : static_cast<int32_t>(cu_seqlens.size()) - 1;
    params.window_size = static_cast<int32_t>(spec.window_size);
    params.num_sinks = static_cast<int32_t>(spec.num_sinks);
    cpu::visibility(params);
    EXPECT_GUARDS_INTACT(far_end);
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        const int64_t row = (b * spec.num_kv_heads + h) * spec.seqlen;
        const auto at = [&](int64_t i) { return (b * spec.seqlen + i) * spec.num_kv_heads + h; };
        Values u(spec.seqlen);
        for (int64_t i = 0; i < spec.seqlen; ++i) u[i] = values[at(i)];
        reference::for_each_query(u, spec, [&](const reference::QuerySelection& query) {
          const int64_t i = query.query, begin = query.document_begin;
          std::vector<char> in_window(spec.seqlen, 0), far(spec.seqlen, 0);
          for (int64_t j = std::max(begin, i - spec.window_size + 1); j <= i; ++j) in_window[j] = 1;
          for (int64_t j = begin; j < begin + spec.num_sinks && j <= i; ++j) far[j] = !in_window[j];
          for (int64_t rank = 0; rank < query.num_selected; ++rank) far[query.pool[rank]] = 1;
          ASSERT_EQ(row_tau[row + i], selected.tau[at(i)]);
          for (int64_t r = 0; r < spec.seqlen; ++r) {
            ASSERT_EQ(window_begin[b * spec.seqlen + i] <= r && r <= i, in_window[r]) << "query " << i << " row " << r;
            ASSERT_EQ(far_begin[row + r] <= i && i < far_end[row + r], far[r]) << "query " << i << " row " << r;
            ASSERT_EQ(frac_begin[row + r], std::min<int64_t>(selected.frac_begin[at(r)], spec.seqlen));
            ASSERT_EQ(frac_end[row + r], std::min<int64_t>(selected.frac_end[at(r)], spec.seqlen));
          }
          const bool is_sink = i - begin < spec.num_sinks;
          ASSERT_EQ(row_scores[row + i], is_sink ? std::numeric_limits<float>::infinity() : scores[at(i)]);
        });
      }
    }
    if (HasFailure()) return;
  }
}

// A selection that a caller made or cut: the gradient indexes queries by these.
TEST(Visibility, FractionsAreClippedToTheSequence) {
  constexpr int32_t kLow = std::numeric_limits<int32_t>::min(), kHigh = std::numeric_limits<int32_t>::max();
  const std::vector<float> scores(4, 0.0f);
  const std::vector<int32_t> expiry(4, 4), begins{kLow, -1, 2, 5}, ends{kHigh, 5, 3, kHigh};
  Poisoned<int32_t> frac_begin(4), frac_end(4);
  VisibilityParams params{};
  params.dtype = DType::kF32;
  params.scores = params.tau = scores.data();
  params.expiry = expiry.data();
  params.frac_begin = begins.data();
  params.frac_end = ends.data();
  params.scores_strides = params.tau_strides = params.index_strides = contiguous(4, 1);
  params.row_frac_begin = frac_begin.data();
  params.row_frac_end = frac_end.data();
  params.batch = params.num_kv_heads = params.window_size = 1;
  params.seqlen = 4;
  cpu::visibility(params);
  EXPECT_EQ(std::vector<int32_t>(frac_begin.data(), frac_begin.data() + 4), (std::vector<int32_t>{0, 0, 2, 4}));
  EXPECT_EQ(std::vector<int32_t>(frac_end.data(), frac_end.data() + 4), (std::vector<int32_t>{4, 4, 3, 4}));
}

}  // namespace
}  // namespace sparsek::test
