// The SparseK operator: known values, the reference, and its defining properties.
#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

template <class T>
struct SparsekResult {
  std::vector<T> p, tau;
};

template <class T>
SparsekResult<T> run_sparsek(const std::vector<T>& z, int64_t rows, int64_t k) {
  Poisoned<T> p(static_cast<int64_t>(z.size())), tau(rows);
  SparsekParams params{};
  params.dtype = kDType<T>;
  params.z = z.data();
  params.p = p.data();
  params.tau = tau.data();
  params.rows = rows;
  params.columns = static_cast<int64_t>(z.size()) / rows;
  params.k = k;
  cpu::sparsek(params);
  EXPECT_FULLY_WRITTEN(p);
  EXPECT_FULLY_WRITTEN(tau);
  EXPECT_GUARDS_INTACT(p);
  return {p.to_vector(), tau.to_vector()};
}

TEST(Sparsek, KnownValues) {
  const auto expect = [](const Values& z, int64_t k, const Values& p, double tau) {
    const SparsekResult<double> result = run_sparsek(z, 1, k);
    EXPECT_ELEMENTS_CLOSE(result.p, p, 1e-6);
    EXPECT_ELEMENTS_CLOSE(result.tau, Values{tau}, 1e-6);
  };
  expect({3, 1, 0.2, -1}, 2, {1, 0.9, 0.1, 0}, 0.1);
  expect({0.5, 0.5, 0.5, 0.5}, 2, {0.5, 0.5, 0.5, 0.5}, 0);
  expect({5, 3, 1, -1}, 2, {1, 1, 0, 0}, 2);
  expect({2, 1.9, 1.8, 0}, 2, {0.766667, 0.666667, 0.566667, 0}, 1.233333);
  expect({0.1, 0.7, 0.4}, 1, {0.033333, 0.633333, 0.333333}, 0.066667);
  expect({4, -7}, 2, {1, 1}, -std::numeric_limits<double>::infinity());
  expect({4, -7}, 9, {1, 1}, -std::numeric_limits<double>::infinity());
}

template <class T>
void expect_reference(reference::Precision precision, double tolerance) {
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t columns : {1, 2, 23, 25, 300}) {
      for (const int64_t k : {1, 7, 24, 299}) {
        const Values z = make_scores(kind, 4, columns, 1, static_cast<uint64_t>(columns));
        const SparsekResult<T> result = run_sparsek(std::vector<T>(z.begin(), z.end()), 4, k);
        for (int64_t row = 0; row < 4; ++row) {
          const auto begin = z.begin() + row * columns;
          const auto expected = reference::sparsek_operator(Values(begin, begin + columns), k, precision);
          const auto p = result.p.begin() + row * columns;
          // The weights are exact for the tau returned; it may round to the neighbour of the reference's.
          const double limit = tolerance * std::max(1.0, std::abs(columns > k ? expected.tau : 0));
          EXPECT_TRUE(rows_close(std::vector<T>(p, p + columns), expected.p, 1, 0, limit)) << name(kind) << " k " << k;
          EXPECT_ELEMENTS_CLOSE(Values{result.tau[row]}, Values{expected.tau}, tolerance);
        }
      }
    }
  }
}
TEST(Sparsek, EqualsReferenceInFloat) {
  expect_reference<float>(reference::Precision::kFloat32, 1e-6);
}
TEST(Sparsek, EqualsReferenceInDouble) {
  expect_reference<double>(reference::Precision::kFloat64, 1e-12);
}

TEST(Sparsek, WeightsSumToTheBudgetAndFollowAPermutation) {
  for (const double std : {0.1, 1.0, 3.0}) {
    Values z = normal(20000, 11, std);
    const SparsekResult<double> result = run_sparsek(z, 1, 777);
    double sum = 0;
    for (const double p : result.p) {
      ASSERT_TRUE(p >= 0 && p <= 1);
      sum += p;
    }
    EXPECT_NEAR(sum, 777, 1e-8);
    std::reverse(z.begin(), z.end());
    SparsekResult<double> reversed = run_sparsek(z, 1, 777);
    std::reverse(reversed.p.begin(), reversed.p.end());
    EXPECT_ELEMENTS_CLOSE(reversed.p, result.p, 1e-12);
  }
}

TEST(Sparsek, RefusesWhatIsNotFinite) {
  EXPECT_THROW(run_sparsek<float>({1, std::numeric_limits<float>::quiet_NaN()}, 1, 1), UsageError);
  EXPECT_THROW(run_sparsek<double>({1, std::numeric_limits<double>::infinity()}, 1, 3), UsageError);
}

}  // namespace
}  // namespace sparsek::test
