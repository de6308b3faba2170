// attention_forward against kernels/reference, row by row, on every instruction set of this processor.
#include "kernels/cpu/attention/attention.h"
#include "tests/kernels/attention/cases.h"

namespace sparsek::test {
namespace {

// The reference's outputs for the queries of the rows.
struct Expected {
  Values out, softmax_lse;
};

template <class T>
Expected expected_rows(const Rows<T>& rows, const reference::AttentionOutputs& outputs) {
  const reference::Spec& s = rows.spec;
  Expected expected;
  const int64_t row = s.num_heads * s.head_dim;
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto begin = outputs.out.begin() + (b * s.seqlen + rows.chunk_begin) * row;
    expected.out.insert(expected.out.end(), begin, begin + rows.seqlen_q * row);
  }
  for (int64_t h = 0; h < s.batch * s.num_heads; ++h) {
    const auto begin = outputs.softmax_lse.begin() + h * s.seqlen + rows.chunk_begin;
    expected.softmax_lse.insert(expected.softmax_lse.end(), begin, begin + rows.seqlen_q);
  }
  return expected;
}

// What a plain bfloat16 evaluation gives: probabilities of the exact logits, gated, rounded to bfloat16, times v, the
// result rounded too. Whole sequences.
Values plain_bf16(const Case<BFloat16>& c, const reference::AttentionOutputs& exact) {
  const reference::Spec& s = c.spec;
  Values result(exact.out.size(), 0.0);
  const int64_t group = s.num_heads / s.num_kv_heads;
  const auto element = [&](const Values& values, int64_t b, int64_t i, int64_t heads, int64_t head, int64_t d) {
    return values[((b * s.seqlen + i) * heads + head) * s.head_dim + d];
  };
  const auto rounded = [](double x) { return static_cast<double>(to_float(to_bf16(static_cast<float>(x)))); };
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      for (int64_t i = 0; i < s.seqlen; ++i) {
        const double lse = exact.softmax_lse[(b * s.num_heads + head) * s.seqlen + i];
        const int64_t out = ((b * s.seqlen + i) * s.num_heads + head) * s.head_dim;
        for (int64_t j = 0; j <= i; ++j) {
          const int64_t n = c.score_index(b, j, head / group), w = s.window_size;
          const bool in_window = i - j < w, is_sink = j < s.num_sinks;
          if (!in_window && !is_sink && !(j + w <= i && i < c.selection.expiry[n])) continue;
          double logit = 0, gate = 1;
          for (int64_t d = 0; d < s.head_dim; ++d) {
            logit += element(c.inputs.q, b, i, s.num_heads, head, d) *
                     element(c.inputs.k, b, j, s.num_kv_heads, head / group, d);
          }
          if (!in_window && !is_sink && s.gate == Gate::kSoft) {
            gate = std::clamp(c.inputs.scores[n] - c.selection.tau[c.score_index(b, i, head / group)], 0.0, 1.0);
          }
          const double p = rounded(std::exp(s.softmax_scale * logit - lse) * gate);
          for (int64_t d = 0; d < s.head_dim; ++d) {
            result[out + d] += p * element(c.inputs.v, b, j, s.num_kv_heads, head / group, d);
          }
        }
        for (int64_t d = 0; d < s.head_dim; ++d) result[out + d] = rounded(result[out + d]);
      }
    }
  }
  return result;
}

template <class T>
void check(const CaseOptions& options, double logit_scale = 1) {
  Case<T> c(options);
  for (double& x : c.inputs.q) x *= logit_scale;  // a power of two: still of type T
  const reference::AttentionOutputs reference = reference::attention_forward(c.inputs, c.spec);
  on_every_isa(c, [&](Rows<T>& rows) {
    const Expected expected = expected_rows(rows, reference);
    cpu::attention_forward(rows.forward());
    const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 * std::sqrt(logit_scale) : 1.2e-2;
    const double lse_tolerance = sizeof(T) == 8   ? 1e-12
                                 : sizeof(T) == 4 ? 5e-6 * std::sqrt(logit_scale)
                                                  : 1e-5 * std::sqrt(logit_scale);
    EXPECT_FULLY_WRITTEN(rows.out);
    EXPECT_FULLY_WRITTEN(rows.softmax_lse);
    EXPECT_GUARDS_INTACT(rows.out);
    EXPECT_GUARDS_INTACT(rows.softmax_lse);
    EXPECT_ROWS_CLOSE(rows.out, expected.out, rows.spec.head_dim, tolerance);
    EXPECT_ELEMENTS_CLOSE(rows.softmax_lse, expected.softmax_lse, lse_tolerance);
  });
}

void check_all(const CaseOptions& options) {
  in_every_type([&](auto type) { check<decltype(type)>(options); });
}
void check_all(const Cases& cases) {
  for (const CaseOptions& options : cases) check_all(options);
}

TEST(AttentionForward, HeadDims) {
  check_all(head_dim_cases(small_case()));
}
TEST(AttentionForward, GroupsAndLengths) {
  check_all(group_cases(small_case()));
}
TEST(AttentionForward, ScoreKindsAndGates) {
  check_all(score_cases(small_case()));
}
TEST(AttentionForward, FarRotary) {
  check_all(far_rotary_cases(small_case()));
}
TEST(AttentionForward, CarriedRows) {
  check_all(carried_cases(small_case()));
}
TEST(AttentionForward, PackedDocuments) {
  check_all(packed_case(small_case()));
}
TEST(AttentionForward, EverySmallShape) {
  check_all(random_cases(small_case(), 20240601, 40));
}

// Rows whose later logits exceed those of their first block by hundreds: only the running maximum holds them.
TEST(AttentionForward, LargeLogits) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    CaseOptions options = small_case();
    options.what = "large logits";
    options.seed = seed;
    options.spec.seqlen = 400;
    options.spec.window_size = 190;
    options.spec.topk = 50;
    in_every_type([&](auto type) { check<decltype(type)>(options, 256); });
  }
}

TEST(AttentionForward, BFloat16AsPlainEvaluation) {
  for (Gate gate : {Gate::kSoft, Gate::kHard}) {
    CaseOptions options = small_case();
    options.spec.gate = gate;
    options.spec.head_dim = 64;
    options.spec.softmax_scale = 0.125;
    options.spec.seqlen = 300;
    options.spec.topk = 60;
    options.spec.window_size = 70;
    const Case<BFloat16> c(options);
    const reference::AttentionOutputs exact = reference::attention_forward(c.inputs, c.spec);
    const Values plain = plain_bf16(c, exact);
    on_every_isa(c, [&](Rows<BFloat16>& rows) {
      cpu::attention_forward(rows.forward());
      EXPECT_ROWS_CLOSE_AS_PLAIN(rows.out, plain, exact.out, rows.spec.head_dim, 2.0);
    });
  }
}

// Later tokens change nothing: the queries before them, computed again with other q, k and v from there on.
TEST(AttentionForward, FutureTokens) {
  CaseOptions options = small_case();
  options.spec.batch = 1;
  const int64_t changed = 77;
  const Case<float> c(options);
  Rows<float> rows(c);
  cpu::attention_forward(rows.forward());
  Rows<float> other(c);
  const int64_t q_row = c.spec.num_heads * c.spec.head_dim, k_row = c.spec.num_kv_heads * c.spec.head_dim;
  for (int64_t n = changed * q_row; n < other.q.size(); ++n) other.q[n] = 3;
  for (int64_t n = changed * k_row; n < other.k.size(); ++n) other.k[n] = other.v[n] = -5;
  cpu::attention_forward(other.forward());
  for (int64_t n = 0; n < changed * q_row; ++n) ASSERT_EQ(rows.out[n], other.out[n]) << n;
}

}  // namespace
}  // namespace sparsek::test
