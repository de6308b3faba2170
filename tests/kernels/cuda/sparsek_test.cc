// eq. 2 on the GPU against kernels/reference, and against kernels/cpu where rows are long.
#include "kernels/cuda/sparsek/sparsek.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/cuda/device.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

template <class T>
struct SparsekResult {
  std::vector<T> p, tau;
};

template <class T>
SparsekResult<T> run_sparsek_cuda(const std::vector<T>& z, int64_t rows, int64_t k) {
  const DeviceArray<T> in(z), p(std::ssize(z)), tau(rows);
  const SparsekParams params{kDType<T>, in.data(), p.data(), tau.data(), rows, std::ssize(z) / rows, k};
  cuda::sparsek(params, nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "sparsek");
  return {p.to_vector(), tau.to_vector()};
}

template <class T>
void expect_known(const Values& z, int64_t k, const Values& p, double tau) {
  const SparsekResult<T> result = run_sparsek_cuda(std::vector<T>(z.begin(), z.end()), 1, k);
  EXPECT_ELEMENTS_CLOSE(result.p, p, 1e-6);
  EXPECT_ELEMENTS_CLOSE(result.tau, Values{tau}, 1e-6);
}

TEST(CudaSparsek, KnownValues) {
  SKIP_WITHOUT_DEVICE();
  const auto expect = [](const Values& z, int64_t k, const Values& p, double tau) {
    SCOPED_TRACE(fmt::format("{} values, k {}, tau {}", z.size(), k, tau));
    expect_known<float>(z, k, p, tau);
    expect_known<double>(z, k, p, tau);
  };
  expect({3, 1, 0.2, -1}, 2, {1, 0.9, 0.1, 0}, 0.1);
  expect({0.5, 0.5, 0.5, 0.5}, 2, {0.5, 0.5, 0.5, 0.5}, 0);
  expect({5, 3, 1, -1}, 2, {1, 1, 0, 0}, 2);
  expect({2, 1.9, 1.8, 0}, 2, {0.766667, 0.666667, 0.566667, 0}, 1.233333);
  expect({0.1, 0.7, 0.4}, 1, {0.033333, 0.633333, 0.333333}, 0.066667);
  expect({4, -7}, 2, {1, 1}, -INFINITY);
  expect({4, -7}, 9, {1, 1}, -INFINITY);
  expect({5, 3, 0.1, 0.1, -1}, 2, {1, 1, 0, 0, 0}, 2);  // the root lies where two fractions vanish, the largest behind
}

template <class T>
void expect_reference(reference::Precision precision, double tolerance) {
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t columns : {1, 2, 23, 31, 300, 1030, 9000}) {
      for (const int64_t k : {1, 7, 24, 299, 1024}) {
        const Values z = make_scores(kind, 4, columns, 1, static_cast<uint64_t>(columns));
        const SparsekResult<T> result = run_sparsek_cuda(std::vector<T>(z.begin(), z.end()), 4, k);
        for (int64_t row = 0; row < 4; ++row) {
          SCOPED_TRACE(fmt::format("{} columns {} k {} row {}", name(kind), columns, k, row));
          const auto begin = z.begin() + row * columns;
          const auto expected = reference::sparsek_operator(Values(begin, begin + columns), k, precision);
          const auto p = result.p.begin() + row * columns;
          const double limit = tolerance * std::max(1.0, std::abs(columns > k ? expected.tau : 0));
          EXPECT_TRUE(rows_close(std::vector<T>(p, p + columns), expected.p, 1, 0, limit));
          EXPECT_ELEMENTS_CLOSE(Values{static_cast<double>(result.tau[row])}, Values{expected.tau}, tolerance);
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
}
TEST(CudaSparsek, EqualsReferenceInFloat) {
  SKIP_WITHOUT_DEVICE();
  expect_reference<float>(reference::Precision::kFloat32, 1e-6);
}
TEST(CudaSparsek, EqualsReferenceInDouble) {
  SKIP_WITHOUT_DEVICE();
  expect_reference<double>(reference::Precision::kFloat64, 1e-12);
}

TEST(CudaSparsek, LongRowsEqualCpu) {
  SKIP_WITHOUT_DEVICE();
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t columns : {70000, 1 << 20}) {
      if (columns > 70000 && kind != ScoreKind::kNormal && kind != ScoreKind::kTies) continue;
      SCOPED_TRACE(fmt::format("{} columns {}", name(kind), columns));
      const std::vector<float> z = to_f32(make_scores(kind, 1, columns, 1, 3));
      const SparsekResult<float> actual = run_sparsek_cuda(z, 1, 1000);
      std::vector<float> p(columns), tau(1);
      cpu::sparsek({DType::kF32, z.data(), p.data(), tau.data(), 1, columns, 1000});
      EXPECT_ELEMENTS_CLOSE(actual.tau, tau, 1e-6);
      EXPECT_ELEMENTS_CLOSE(actual.p, p, 1e-6 * std::max(1.0f, std::abs(tau[0])));
    }
  }
}

TEST(CudaSparsek, ManyRows) {
  SKIP_WITHOUT_DEVICE();
  const int64_t rows = 70000, columns = 5;
  const std::vector<float> z = to_f32(normal(rows * columns, 4));
  const SparsekResult<float> actual = run_sparsek_cuda(z, rows, 2);
  std::vector<float> p(z.size()), tau(rows);
  cpu::sparsek({DType::kF32, z.data(), p.data(), tau.data(), rows, columns, 2});
  EXPECT_ELEMENTS_CLOSE(actual.p, p, 1e-6);
  EXPECT_ELEMENTS_CLOSE(actual.tau, tau, 1e-6);
}

TEST(CudaSparsek, ARowThatIsNotFiniteIsNanAlone) {
  SKIP_WITHOUT_DEVICE();
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> z = to_f32(normal(3 * 500, 5));
    z[500 + 77] = bad;
    const SparsekResult<float> result = run_sparsek_cuda(z, 3, 20);
    for (int64_t n = 0; n < 1500; ++n) ASSERT_EQ(std::isnan(result.p[n]), n / 500 == 1) << n;
    EXPECT_TRUE(!std::isnan(result.tau[0]) && std::isnan(result.tau[1]) && !std::isnan(result.tau[2]));
  }
}

template <class T>
void expect_gradient(reference::Precision precision, double tolerance) {
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t columns : {1, 31, 300, 9000}) {
      const int64_t k = columns / 3 + 1;
      SCOPED_TRACE(fmt::format("{} columns {}", name(kind), columns));
      const Values z = make_scores(kind, 3, columns, 1, 8), dp = round_to_f32(normal(3 * columns, 9));
      Values p, expected;
      for (int64_t row = 0; row < 3; ++row) {
        const Values one(z.begin() + row * columns, z.begin() + (row + 1) * columns);
        const Values gradient(dp.begin() + row * columns, dp.begin() + (row + 1) * columns);
        const Values weights = reference::sparsek_operator(one, k, precision).p,
                     dz = reference::sparsek_operator_backward(one, k, precision, gradient);
        p.insert(p.end(), weights.begin(), weights.end()), expected.insert(expected.end(), dz.begin(), dz.end());
      }
      const DeviceArray<T> in_p(std::vector<T>(p.begin(), p.end())), in_dp(std::vector<T>(dp.begin(), dp.end())),
          dz(std::ssize(dp));
      cuda::sparsek_backward({kDType<T>, in_dp.data(), in_p.data(), dz.data(), 3, columns}, nullptr);
      cuda::check_cuda(cudaDeviceSynchronize(), "sparsek_backward");
      EXPECT_ELEMENTS_CLOSE(dz.to_vector(), expected, tolerance);
    }
  }
}
TEST(CudaSparsek, GradientEqualsReference) {
  SKIP_WITHOUT_DEVICE();
  expect_gradient<float>(reference::Precision::kFloat32, 1e-6);
  expect_gradient<double>(reference::Precision::kFloat64, 1e-13);
}

}  // namespace
}  // namespace sparsek::test
