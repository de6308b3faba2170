// How far gradients may be from the reference, row by row.
#pragma once
#include "tests/kernels/properties/problem.h"

namespace sparsek::test {

// What rounding can do to each row of section 5's sums (Euclidean norm per row of head_dim) when P, out (hence delta),
// dS and the results are rounded to bfloat16: 2^-8 of the sum of the absolute terms, two roundings of 2^-9 in each.
struct Bf16Limits {
  Values dq, dk, dv, dq_far, dk_far;  // one per row
};
inline Bf16Limits bf16_limits(const Problem& problem) {
  const Spec& spec = problem.spec;
  const AttentionInputs& in = problem.inputs;
  const reference::AttentionOutputs outputs = reference::attention_forward(in, spec);
  const int64_t dim = spec.head_dim, T = spec.seqlen, group = spec.num_heads / spec.num_kv_heads;
  const int64_t q_rows = static_cast<int64_t>(in.q.size()) / dim, kv_rows = static_cast<int64_t>(in.k.size()) / dim;
  const bool far_rotary = !in.q_far.empty();
  Bf16Limits limits{Values(q_rows), Values(kv_rows), Values(kv_rows), Values(q_rows), Values(kv_rows)};
  const auto dot = [dim](const Values& a, int64_t a_row, const Values& b, int64_t b_row) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += a[a_row * dim + d] * b[b_row * dim + d];
    return sum;
  };
  const auto norm = [&](const Values& a, int64_t row) { return std::sqrt(dot(a, row, a, row)); };
  const auto add = [&](int64_t b, int64_t i, int64_t j, int64_t head, bool outside) {
    const bool far = outside && far_rotary;
    const int64_t q_row = (b * T + i) * spec.num_heads + head, k_row = (b * T + j) * spec.num_kv_heads + head / group;
    const int64_t lse_at = (b * spec.num_heads + head) * T + i;
    const Values &q = far ? in.q_far : in.q, &k = far ? in.k_far : in.k;
    const double p = std::exp(spec.softmax_scale * dot(q, q_row, k, k_row) - outputs.softmax_lse[lse_at]);
    const double dout = norm(problem.dout, q_row);
    const double ds = p * (std::abs(dot(problem.dout, q_row, in.v, k_row)) + dout * norm(outputs.out, q_row) +
                           std::abs(problem.dlse[lse_at]));
    limits.dv[k_row] += 0x1p-8 * p * dout;
    (far ? limits.dq_far : limits.dq)[q_row] += 0x1p-8 * spec.softmax_scale * ds * norm(k, k_row);
    (far ? limits.dk_far : limits.dk)[k_row] += 0x1p-8 * spec.softmax_scale * ds * norm(q, q_row);
  };
  for (int64_t unit = 0; unit < spec.batch * spec.num_kv_heads; ++unit) {
    const int64_t b = unit / spec.num_kv_heads, kv_head = unit % spec.num_kv_heads;
    Values u;
    for (int64_t t = 0; t < T; ++t) u.push_back(in.scores[(b * T + t) * spec.num_kv_heads + kv_head]);
    reference::for_each_query(u, spec, [&](const reference::QuerySelection& selection) {
      const int64_t i = selection.query, begin = selection.document_begin;
      const int64_t window = std::max(begin, i - spec.window_size + 1);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t j = begin; j < std::min(begin + spec.num_sinks, window); ++j) add(b, i, j, head, true);
        for (int64_t j = window; j <= i; ++j) add(b, i, j, head, false);
        for (int64_t rank = 0; rank < selection.num_selected; ++rank) add(b, i, selection.pool[rank], head, true);
      }
    });
  }
  return limits;
}

inline ::testing::AssertionResult rows_within(const Values& actual, const Values& expected, const Values& limits,
                                              int64_t row_size) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << "sizes differ";
  const int64_t num_rows = static_cast<int64_t>(actual.size()) / row_size;
  RowReport report;
  for (int64_t row = 0; row < num_rows; ++row) {
    const double *a = &actual[row * row_size], *e = &expected[row * row_size];
    const RowError error = row_error(a, e, row_size);
    const double limit = limits[row] + 0x1p-8 * error.norm;
    if (!(error.difference <= limit)) report.add_bad(row, error.difference, limit, a, e, row_size);
  }
  return report.result(num_rows);
}

// float32 and float64: relative to the row, with a floor for rows whose contributions cancel.
template <class Element>
void expect_gradients(const AttentionGradients& actual, const AttentionGradients& expected, const Problem& problem) {
  const int64_t row = problem.spec.head_dim;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const Bf16Limits limits = bf16_limits(problem);
    EXPECT_TRUE(rows_within(actual.dq, expected.dq, limits.dq, row)) << "dq";
    EXPECT_TRUE(rows_within(actual.dk, expected.dk, limits.dk, row)) << "dk";
    EXPECT_TRUE(rows_within(actual.dv, expected.dv, limits.dv, row)) << "dv";
    EXPECT_TRUE(rows_within(actual.dq_far, expected.dq_far, limits.dq_far, row)) << "dq_far";
    EXPECT_TRUE(rows_within(actual.dk_far, expected.dk_far, limits.dk_far, row)) << "dk_far";
  } else {
    const double tolerance = tolerance_of<Element>().gradient;
    const auto check = [&](const Values& a, const Values& e, const char* what) {
      double sum = 0;
      for (double x : e) sum += x * x;
      const double mean_row = std::sqrt(sum * static_cast<double>(row) / std::max(1.0, static_cast<double>(e.size())));
      EXPECT_TRUE(rows_close(a, e, row, tolerance, 0.2 * tolerance * mean_row)) << what;
    };
    check(actual.dq, expected.dq, "dq");
    check(actual.dk, expected.dk, "dk");
    check(actual.dv, expected.dv, "dv");
    check(actual.dq_far, expected.dq_far, "dq_far");
    check(actual.dk_far, expected.dk_far, "dk_far");
  }
  EXPECT_CLOSE_TO_MAXIMUM(actual.dscores, expected.dscores, tolerance_of<Element>().dscores);
}

}  // namespace sparsek::test
