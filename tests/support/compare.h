// Comparisons of a kernel's result with the reference. Every condition is written so that NaN fails, and every limit is
// relative to the row, never to the largest element of the tensor: late causal rows are small.
#pragma once
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "base/bf16.h"

namespace sparsek::test {

inline double as_double(double x) {
  return x;
}
inline double as_double(float x) {
  return static_cast<double>(x);
}
inline double as_double(BFloat16 x) {
  return static_cast<double>(to_float(x));
}
inline double as_double(int32_t x) {
  return static_cast<double>(x);
}
inline double as_double(int64_t x) {
  return static_cast<double>(x);
}

// Anything with data() and size(): std::vector, Poisoned, std::span.
template <class Container>
std::vector<double> as_doubles(const Container& values) {
  std::vector<double> result;
  result.reserve(static_cast<size_t>(values.size()));
  for (int64_t n = 0; n < static_cast<int64_t>(values.size()); ++n) result.push_back(as_double(values.data()[n]));
  return result;
}

// ||actual - expected|| and ||expected|| of one row (Euclidean).
struct RowError {
  double difference = 0, norm = 0;
  double relative() const { return norm > 0 ? difference / norm : (difference == 0 ? 0 : INFINITY); }
};
inline RowError row_error(const double* actual, const double* expected, int64_t row_size) {
  double difference = 0, norm = 0;
  for (int64_t d = 0; d < row_size; ++d) {
    difference += (actual[d] - expected[d]) * (actual[d] - expected[d]);
    norm += expected[d] * expected[d];
  }
  return {std::sqrt(difference), std::sqrt(norm)};
}

// Names the first bad row and the worst one.
class RowReport {
 public:
  void add_bad(int64_t row, double error, double limit, const double* actual, const double* expected,
               int64_t row_size) {
    if (num_bad_++ == 0) first_ = describe(row, error, limit, actual, expected, row_size);
    if (!(error <= worst_)) {
      worst_ = error;
      worst_text_ = describe(row, error, limit, actual, expected, row_size);
    }
  }
  ::testing::AssertionResult result(int64_t num_rows) const {
    if (num_bad_ == 0) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << fmt::format("{} of {} rows are off\n  first: {}\n  worst: {}", num_bad_,
                                                        num_rows, first_, worst_text_);
  }

 private:
  static std::string describe(int64_t row, double error, double limit, const double* actual, const double* expected,
                              int64_t row_size) {
    std::string text = fmt::format("row {}: error {:.3g}, limit {:.3g}; got [", row, error, limit);
    const int64_t shown = std::min<int64_t>(row_size, 4);
    for (int64_t d = 0; d < shown; ++d) text += fmt::format("{}{:.6g}", d ? " " : "", actual[d]);
    text += "] want [";
    for (int64_t d = 0; d < shown; ++d) text += fmt::format("{}{:.6g}", d ? " " : "", expected[d]);
    return text + "]";
  }

  int64_t num_bad_ = 0;
  double worst_ = -1;
  std::string first_, worst_text_;
};

// Every row of row_size elements: ||actual - expected|| <= tolerance * ||expected|| + floor. `floor` is for rows that
// cancel to nothing; leave it 0 for outputs.
template <class Actual, class Expected>
::testing::AssertionResult rows_close(const Actual& actual_values, const Expected& expected_values, int64_t row_size,
                                      double tolerance, double floor = 0) {
  const std::vector<double> actual = as_doubles(actual_values), expected = as_doubles(expected_values);
  if (actual.size() != expected.size() || actual.size() % row_size != 0) {
    return ::testing::AssertionFailure() << fmt::format("sizes: got {} elements, want {}, rows of {}", actual.size(),
                                                        expected.size(), row_size);
  }
  const int64_t num_rows = static_cast<int64_t>(actual.size()) / row_size;
  RowReport report;
  for (int64_t row = 0; row < num_rows; ++row) {
    const double *a = &actual[row * row_size], *e = &expected[row * row_size];
    const RowError error = row_error(a, e, row_size);
    const double limit = tolerance * error.norm + floor;
    if (!(error.difference <= limit)) report.add_bad(row, error.difference, limit, a, e, row_size);
  }
  return report.result(num_rows);
}

// The same-precision rule: each row is at most `slack` times as far from `expected` as `plain`, the same computation
// done plainly in the same precision (or as plain's median relative error, where a row of plain was lucky).
template <class Actual, class Plain, class Expected>
::testing::AssertionResult rows_close_as_plain(const Actual& actual_values, const Plain& plain_values,
                                               const Expected& expected_values, int64_t row_size, double slack = 2.0) {
  const std::vector<double> actual = as_doubles(actual_values), plain = as_doubles(plain_values),
                            expected = as_doubles(expected_values);
  if (actual.size() != expected.size() || plain.size() != expected.size() || actual.size() % row_size != 0) {
    return ::testing::AssertionFailure() << fmt::format("sizes: got {}, plain {}, want {} elements, rows of {}",
                                                        actual.size(), plain.size(), expected.size(), row_size);
  }
  const int64_t num_rows = static_cast<int64_t>(actual.size()) / row_size;
  std::vector<double> relative(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    relative[row] = row_error(&plain[row * row_size], &expected[row * row_size], row_size).relative();
  }
  const auto middle = relative.begin() + num_rows / 2;
  std::nth_element(relative.begin(), middle, relative.end());
  RowReport report;
  for (int64_t row = 0; row < num_rows; ++row) {
    const double *a = &actual[row * row_size], *e = &expected[row * row_size];
    const RowError error = row_error(a, e, row_size), plain_error = row_error(&plain[row * row_size], e, row_size);
    const double limit = slack * std::max(plain_error.difference, *middle * error.norm);
    if (!(error.difference <= limit)) report.add_bad(row, error.difference, limit, a, e, row_size);
  }
  return report.result(num_rows);
}

// Every element: |actual - expected| <= tolerance * max(1, |expected|); infinities equal. For tau, gates and lse.
template <class Actual, class Expected>
::testing::AssertionResult elements_close(const Actual& actual_values, const Expected& expected_values,
                                          double tolerance) {
  const std::vector<double> actual = as_doubles(actual_values), expected = as_doubles(expected_values);
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << fmt::format("sizes: got {}, want {}", actual.size(), expected.size());
  }
  RowReport report;
  for (size_t n = 0; n < actual.size(); ++n) {
    const double limit = tolerance * std::max(1.0, std::abs(expected[n]));
    const bool close =
        std::isfinite(expected[n]) ? std::abs(actual[n] - expected[n]) <= limit : actual[n] == expected[n];
    if (!close) report.add_bad(n, std::abs(actual[n] - expected[n]), limit, &actual[n], &expected[n], 1);
  }
  return report.result(actual.size());
}

// Every element: |actual - expected| <= tolerance * max |expected|. For dscores, whose elements cancel.
template <class Actual, class Expected>
::testing::AssertionResult close_to_maximum(const Actual& actual_values, const Expected& expected_values,
                                            double tolerance, double floor = 0) {
  const std::vector<double> actual = as_doubles(actual_values), expected = as_doubles(expected_values);
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << fmt::format("sizes: got {}, want {}", actual.size(), expected.size());
  }
  double maximum = 0;
  for (double value : expected) maximum = std::max(maximum, std::abs(value));
  const double limit = tolerance * maximum + floor;
  RowReport report;
  for (size_t n = 0; n < actual.size(); ++n) {
    const double error = std::abs(actual[n] - expected[n]);
    if (!(error <= limit)) report.add_bad(n, error, limit, &actual[n], &expected[n], 1);
  }
  return report.result(actual.size());
}

// Every element exactly equal, for integers and for values that must be the same bits (-0.0 equals 0.0 here).
template <class Actual, class Expected>
::testing::AssertionResult all_equal(const Actual& actual_values, const Expected& expected_values) {
  const std::vector<double> actual = as_doubles(actual_values), expected = as_doubles(expected_values);
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << fmt::format("sizes: got {}, want {}", actual.size(), expected.size());
  }
  RowReport report;
  for (size_t n = 0; n < actual.size(); ++n) {
    if (!(actual[n] == expected[n])) {
      report.add_bad(n, std::abs(actual[n] - expected[n]), 0, &actual[n], &expected[n], 1);
    }
  }
  return report.result(actual.size());
}

}  // namespace sparsek::test

#define EXPECT_ROWS_CLOSE(actual, expected, row_size, tolerance) \
  EXPECT_TRUE(::sparsek::test::rows_close(actual, expected, row_size, tolerance)) << #actual
#define EXPECT_ROWS_CLOSE_AS_PLAIN(actual, plain, expected, row_size, slack) \
  EXPECT_TRUE(::sparsek::test::rows_close_as_plain(actual, plain, expected, row_size, slack)) << #actual
#define EXPECT_ELEMENTS_CLOSE(actual, expected, tolerance) \
  EXPECT_TRUE(::sparsek::test::elements_close(actual, expected, tolerance)) << #actual
#define EXPECT_CLOSE_TO_MAXIMUM(actual, expected, tolerance) \
  EXPECT_TRUE(::sparsek::test::close_to_maximum(actual, expected, tolerance)) << #actual
#define EXPECT_ALL_EQUAL(actual, expected) EXPECT_TRUE(::sparsek::test::all_equal(actual, expected)) << #actual
