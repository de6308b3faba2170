// The reference's selection against a transcription of eq. 2-6 that shares nothing with it: tau by bisection, ranks by
// counting, sets query by query; then facts a-d of docs/math.md on those sets.
#include <algorithm>
#include <limits>

#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek {
namespace {

using reference::for_each_query;
using reference::Indices;
using reference::Precision;
using reference::Projection;
using reference::QuerySelection;
using reference::Selection;
using reference::Spec;
using reference::Values;
using test::ScoreKind;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double excess(const Values& z, double tau, int64_t k) {  // f of eq. 2
  double sum = -static_cast<double>(k);
  for (double x : z) sum += std::min(1.0, std::max(0.0, x - tau));
  return sum;
}

// The supremum of { tau : f(tau) >= 0 }.
double bisect(const Values& z, int64_t k) {
  double low = *std::min_element(z.begin(), z.end()) - 2, high = *std::max_element(z.begin(), z.end()) + 1;
  for (int step = 0; step < 200; ++step) {
    const double middle = low + (high - low) / 2;
    (excess(z, middle, k) >= -1e-13 * static_cast<double>(k) ? low : high) = middle;
  }
  return low;
}

// What eq. 3-6 say about one query of one document, by counting.
struct Transcribed {
  Indices selected, pool;  // ascending
  Values pool_scores;
};
Transcribed transcribe(const Values& u, int64_t begin, int64_t i, const Spec& spec) {
  Transcribed result;
  const int64_t first = begin + spec.num_sinks, last = i - spec.window_size;
  for (int64_t j = first; j <= last; ++j) {
    int64_t rank = 0;
    for (int64_t other = first; other <= last; ++other) {
      if (u[other] > u[j] || (u[other] == u[j] && other < j)) ++rank;
    }
    if (spec.pool_size == 0 || rank < spec.pool_size) {
      result.pool.push_back(j);
      result.pool_scores.push_back(u[j]);
      if (rank < spec.topk) result.selected.push_back(j);
    }
  }
  return result;
}

Indices sorted(Indices keys) {
  std::sort(keys.begin(), keys.end());
  return keys;
}

Spec spec_of(int64_t seqlen, int64_t topk, int64_t window_size, int64_t num_sinks, int64_t pool_size) {
  Spec spec;
  spec.seqlen = seqlen;
  spec.topk = topk;
  spec.window_size = window_size;
  spec.num_sinks = num_sinks;
  spec.pool_size = pool_size;
  return spec;
}

const Spec kSpecs[] = {spec_of(90, 6, 8, 2, 0),  spec_of(90, 6, 8, 2, 11), spec_of(70, 1, 1, 0, 2),
                       spec_of(70, 5, 1, 3, 6),  spec_of(50, 60, 4, 1, 0), spec_of(20, 3, 32, 2, 8),
                       spec_of(95, 16, 5, 0, 17)};

TEST(SparsekOperator, KnownValues) {
  const auto check = [](const Values& z, int64_t k, const Values& p, double tau) {
    const Projection result = reference::sparsek_operator(z, k, Precision::kFloat64);
    EXPECT_ELEMENTS_CLOSE(result.p, p, 1e-6);
    EXPECT_ELEMENTS_CLOSE(Values{result.tau}, Values{tau}, 1e-6);
  };
  check({3, 1, 0.2, -1}, 2, {1, 0.9, 0.1, 0}, 0.1);
  check({0.5, 0.5, 0.5, 0.5}, 2, {0.5, 0.5, 0.5, 0.5}, 0);
  check({5, 3, 1, -1}, 2, {1, 1, 0, 0}, 2);
  check({2, 1.9, 1.8, 0}, 2, {0.766667, 0.666667, 0.566667, 0}, 1.233333);
  check({0.1, 0.7, 0.4}, 1, {0.033333, 0.633333, 0.333333}, 0.066667);
  check({4, -7}, 2, {1, 1}, -kInfinity);
}

// The projection is the unique feasible p with p_j = clamp(z_j - tau) for one tau: feasibility and the optimality
// conditions of argmin ||p - z||^2 are checked without using tau.
TEST(SparsekOperator, IsTheProjection) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const int64_t n = 2 + static_cast<int64_t>(seed % 37), k = 1 + static_cast<int64_t>(seed / 3) % (n - 1);
    const double std = seed % 3 == 0 ? 0.05 : seed % 3 == 1 ? 1.0 : 3.0;
    const Values z = test::normal(n, seed, std, seed % 5 == 0 ? 8 : 0);
    const Projection result = reference::sparsek_operator(z, k, Precision::kFloat64);
    double sum = 0, lowest_raised = kInfinity, highest_lowered = -kInfinity;
    for (int64_t j = 0; j < n; ++j) {
      const double p = result.p[j];
      EXPECT_TRUE(p >= 0 && p <= 1) << p;
      sum += p;
      // Moving weight from a to b lowers the distance iff (z_b - p_b) > (z_a - p_a).
      if (p > 1e-12) lowest_raised = std::min(lowest_raised, z[j] - p);
      if (p < 1 - 1e-12) highest_lowered = std::max(highest_lowered, z[j] - p);
    }
    EXPECT_NEAR(sum, static_cast<double>(k), 1e-10);
    EXPECT_LE(highest_lowered, lowest_raised + 1e-10);
    EXPECT_NEAR(result.tau, bisect(z, k), 1e-9);
  }
}

TEST(SparsekOperator, LargestRootWhereFIsFlat) {
  // f is 0 on [1, 2]: the largest root makes the second element's weight exactly 1.
  EXPECT_EQ(reference::sparsek_operator({5, 3, 1, -1}, 2, Precision::kFloat64).tau, 2);
  EXPECT_EQ(reference::sparsek_operator({9, 7, -4, -4, -4}, 2, Precision::kFloat32).tau, 6);
  EXPECT_EQ(reference::sparsek_operator({1, 0}, 1, Precision::kFloat64).tau, 0);
}

TEST(SparsekOperator, Properties) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const int64_t n = 40, k = 1 + static_cast<int64_t>(seed % 20);
    const Values z = test::normal(n, seed, 0.7), change = test::uniform(n, seed, -0.1, 0.1);
    const Projection base = reference::sparsek_operator(z, k, Precision::kFloat64);
    Values shifted = z, moved = z, reversed(z.rbegin(), z.rend());
    double largest_change = 0;
    for (int64_t j = 0; j < n; ++j) {
      shifted[j] += 17.25;
      moved[j] += change[j];
      largest_change = std::max(largest_change, std::abs(change[j]));
    }
    EXPECT_ELEMENTS_CLOSE(reference::sparsek_operator(shifted, k, Precision::kFloat64).p, base.p, 1e-12);
    EXPECT_LE(std::abs(reference::sparsek_operator(moved, k, Precision::kFloat64).tau - base.tau), largest_change);
    const Values p_reversed = reference::sparsek_operator(reversed, k, Precision::kFloat64).p;
    EXPECT_ELEMENTS_CLOSE(Values(p_reversed.rbegin(), p_reversed.rend()), base.p, 1e-12);
    const auto support = std::count_if(base.p.begin(), base.p.end(), [](double p) { return p > 0; });
    Values descending = base.p;
    std::sort(descending.begin(), descending.end(), std::greater<>());
    EXPECT_GE(descending[k - 1], 1.0 / static_cast<double>(support - k + 1) - 1e-12);
  }
}

TEST(SparsekOperator, GradientIsTheJacobian) {
  const double step = 1e-6;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    const int64_t n = 12, k = 1 + static_cast<int64_t>(seed % 6);
    const Values z = test::normal(n, seed, seed % 2 ? 0.3 : 2.0), dp = test::normal(n, seed + 500);
    const Values dz = reference::sparsek_operator_backward(z, k, Precision::kFloat64, dp);
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      sum += dz[j];
      Values up = z, down = z;
      up[j] += step;
      down[j] -= step;
      const Values p_up = reference::sparsek_operator(up, k, Precision::kFloat64).p;
      const Values p_down = reference::sparsek_operator(down, k, Precision::kFloat64).p;
      double difference = 0;
      for (int64_t a = 0; a < n; ++a) difference += dp[a] * (p_up[a] - p_down[a]) / (2 * step);
      EXPECT_NEAR(dz[j], difference, 1e-7);
    }
    EXPECT_NEAR(sum, 0, 1e-12);
  }
  // F empty: nothing moves, although clamp alone would pass the gradient on.
  EXPECT_ALL_EQUAL(reference::sparsek_operator_backward({5, 3, 1, -1}, 2, Precision::kFloat64, {1, 2, 3, 4}),
                   (Values{0, 0, 0, 0}));
}

TEST(Selection, EqualsTheTranscription) {
  for (const Spec& base : kSpecs) {
    for (ScoreKind kind : test::kAllScoreKinds) {
      for (Precision precision : {Precision::kFloat32, Precision::kFloat64}) {
        Spec spec = base;
        spec.precision = precision;
        SCOPED_TRACE(fmt::format("{} T {} k {} w {} s {} m {}", test::name(kind), spec.seqlen, spec.topk,
                                 spec.window_size, spec.num_sinks, spec.pool_size));
        const Values u = test::make_scores(kind, 1, spec.seqlen, 1, 11);
        int64_t queries = 0;
        for_each_query(u, spec, [&](const QuerySelection& selection) {
          const int64_t i = selection.query;
          EXPECT_EQ(i, queries++);
          const Transcribed expected = transcribe(u, 0, i, spec);
          ASSERT_EQ(sorted(selection.pool), expected.pool) << "query " << i;
          const auto end = selection.pool.begin() + selection.num_selected;
          ASSERT_EQ(sorted({selection.pool.begin(), end}), expected.selected) << "query " << i;
          ASSERT_EQ(selection.weights.size(), selection.pool.size());
          if (static_cast<int64_t>(expected.pool.size()) <= spec.topk) {
            EXPECT_EQ(selection.tau, -kInfinity) << "query " << i;
            for (double p : selection.weights) EXPECT_EQ(p, 1) << "query " << i;
            return;
          }
          const double tau = bisect(expected.pool_scores, spec.topk);
          const double tolerance = (precision == Precision::kFloat32 ? 1e-7 : 1e-11) * std::max(1.0, std::abs(tau));
          EXPECT_NEAR(selection.tau, tau, tolerance) << "query " << i;
          for (size_t rank = 0; rank < selection.pool.size(); ++rank) {
            const double u_j = u[selection.pool[rank]];
            EXPECT_NEAR(selection.weights[rank], std::clamp(u_j - tau, 0.0, 1.0), 2 * tolerance) << "query " << i;
            if (precision == Precision::kFloat32) {  // exactly the float32 difference from a float32 tau
              const float gate = std::clamp(static_cast<float>(u_j) - static_cast<float>(selection.tau), 0.0f, 1.0f);
              EXPECT_EQ(selection.tau, static_cast<double>(static_cast<float>(selection.tau)));
              EXPECT_EQ(selection.weights[rank], static_cast<double>(gate)) << "query " << i;
            }
          }
        });
        EXPECT_EQ(queries, spec.seqlen);
      }
    }
  }
}

// Facts a-d, and that select()'s two pairs of integers describe the sets completely.
TEST(Selection, FactsAndIntervals) {
  for (const Spec& spec : kSpecs) {
    for (ScoreKind kind : test::kAllScoreKinds) {
      SCOPED_TRACE(fmt::format("{} T {} k {} w {} s {} m {}", test::name(kind), spec.seqlen, spec.topk,
                               spec.window_size, spec.num_sinks, spec.pool_size));
      const int64_t seqlen = spec.seqlen;
      const Values u = test::make_scores(kind, 1, seqlen, 1, 12);
      const Selection selection = reference::select(u, spec);
      double previous_tau = -kInfinity;
      Indices previous;
      for_each_query(u, spec, [&](const QuerySelection& query) {
        const int64_t i = query.query;
        EXPECT_EQ(selection.tau[i], query.tau);
        EXPECT_GE(query.tau, previous_tau) << "fact a, query " << i;
        previous_tau = query.tau;
        std::vector<bool> in_a(seqlen), in_f(seqlen);
        for (size_t rank = 0; rank < query.pool.size(); ++rank) {
          if (static_cast<int64_t>(rank) < query.num_selected) in_a[query.pool[rank]] = true;
          const double p = query.weights[rank];
          if (p > 0 && p < 1) in_f[query.pool[rank]] = true;
        }
        int64_t entered = 0, left = 0;
        for (int64_t j = 0; j < seqlen; ++j) {
          EXPECT_EQ(in_a[j], j + spec.window_size <= i && i < selection.expiry[j]) << "query " << i << " key " << j;
          EXPECT_EQ(in_f[j], selection.frac_begin[j] <= i && i < selection.frac_end[j])
              << "query " << i << " key " << j;
          const bool was = std::find(previous.begin(), previous.end(), j) != previous.end();
          entered += in_a[j] && !was;
          left += !in_a[j] && was;
        }
        EXPECT_LE(entered, 1) << "fact d, query " << i;
        EXPECT_LE(left, 1) << "fact d, query " << i;
        previous.assign(query.pool.begin(), query.pool.begin() + query.num_selected);
      });
      for (int64_t j = 0; j < seqlen; ++j) {
        const int64_t arrival = j + spec.window_size;
        EXPECT_GE(selection.expiry[j], arrival);
        EXPECT_GE(selection.frac_begin[j], arrival);
        EXPECT_GE(selection.frac_end[j], selection.frac_begin[j]);
        if (selection.frac_begin[j] == selection.frac_end[j]) {
          EXPECT_EQ(selection.frac_begin[j], arrival);
        }
        if (j < spec.num_sinks || arrival >= seqlen) {
          EXPECT_EQ(selection.expiry[j], arrival);
        }
        EXPECT_LE(selection.expiry[j], std::max(arrival, seqlen));
      }
    }
  }
}

TEST(Selection, TiesGoToTheSmallerIndex) {
  const Spec spec = spec_of(12, 2, 1, 0, 0);
  const Selection selection = reference::select({0.0, -0.0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, spec);
  EXPECT_ALL_EQUAL(selection.expiry, (Indices{12, 6, 3, 4, 5, 12, 7, 8, 9, 10, 11, 12}));
}

TEST(Selection, PackedDocumentsAndBatchRowsAreSeparate) {
  for (ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kRising, ScoreKind::kTies}) {
    Spec packed = spec_of(120, 5, 6, 2, 9);
    packed.num_kv_heads = 2;
    packed.cu_seqlens = {0, 50, 51, 60, 120};
    const Values u = test::make_scores(kind, 1, 120, 2, 13);
    const Selection all = reference::select(u, packed);
    for (size_t d = 0; d + 1 < packed.cu_seqlens.size(); ++d) {
      const int64_t begin = packed.cu_seqlens[d], end = packed.cu_seqlens[d + 1];
      Spec alone = packed;
      alone.cu_seqlens = {};
      alone.seqlen = end - begin;
      const Selection one = reference::select({u.begin() + begin * 2, u.begin() + end * 2}, alone);
      for (int64_t n = 0; n < alone.seqlen * 2; ++n) {
        EXPECT_EQ(all.tau[begin * 2 + n], one.tau[n]);
        EXPECT_EQ(all.expiry[begin * 2 + n], begin + one.expiry[n]);
        EXPECT_EQ(all.frac_begin[begin * 2 + n], begin + one.frac_begin[n]);
        EXPECT_EQ(all.frac_end[begin * 2 + n], begin + one.frac_end[n]);
      }
    }
    Spec rows = spec_of(60, 5, 6, 2, 9);
    rows.batch = 2;
    rows.num_kv_heads = 2;
    const Selection both = reference::select(u, rows);
    rows.batch = 1;
    const Selection second = reference::select({u.begin() + 120, u.end()}, rows);
    EXPECT_ALL_EQUAL((Indices{both.expiry.begin() + 120, both.expiry.end()}), second.expiry);
    EXPECT_ALL_EQUAL((Values{both.tau.begin() + 120, both.tau.end()}), second.tau);
  }
}

}  // namespace
}  // namespace sparsek
