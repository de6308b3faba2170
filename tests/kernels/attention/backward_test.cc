// attention_backward against kernels/reference, row by row, on every instruction set of this processor, and against
// differences of attention_forward in float64.
#include <cstring>

#include "kernels/cpu/attention/attention.h"
#include "tests/kernels/attention/cases.h"

namespace sparsek::test {
namespace {

// The gradients of one call, by row.
template <class T>
struct Gradients {
  explicit Gradients(Rows<T>& rows)
      : num_score_rows(rows.num_pool_rows + rows.seqlen_k),
        frac_begin(rows.spec.batch * rows.spec.num_kv_heads * num_score_rows, 0),
        frac_end(frac_begin.size(), 0),
        dq(rows.q.size()),
        dk(rows.k.size()),
        dv(rows.k.size()),
        dq_far(rows.q_far.size()),
        dk_far(rows.k_far.size()),
        dscores(frac_begin.size()) {
    const int64_t lanes = rows.spec.batch * rows.spec.num_kv_heads;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const auto set = [&](int64_t score_row, int64_t position) {
        const int64_t b = lane / rows.spec.num_kv_heads, h = lane % rows.spec.num_kv_heads;
        const int64_t n = rows.source.score_index(b, position, h);
        const auto clip = [&](int64_t i) {
          return static_cast<int32_t>(std::clamp<int64_t>(i - rows.chunk_begin, 0, rows.seqlen_q));
        };
        frac_begin[lane * num_score_rows + score_row] = clip(rows.source.selection.frac_begin[n]);
        frac_end[lane * num_score_rows + score_row] = clip(rows.source.selection.frac_end[n]);
      };
      const auto& pool = rows.pool_positions[lane];
      for (size_t n = 0; n < pool.size(); ++n) set(static_cast<int64_t>(n), pool[n]);
      for (int64_t r = 0; r < rows.seqlen_k; ++r) {
        const int64_t position = rows.positions[lane * rows.seqlen_k + r];
        if (position >= 0) set(rows.num_pool_rows + r, position);
      }
    }
  }

  AttentionBwdParams params(Rows<T>& rows, bool deterministic) {
    AttentionBwdParams p{};
    p.fwd = rows.forward();
    p.dout = rows.dout.data();
    p.dlse = rows.dlse.size() > 0 ? rows.dlse.data() : nullptr;
    p.frac_begin = frac_begin.data();
    p.frac_end = frac_end.data();
    p.dq = dq.data();
    p.dk = dk.data();
    p.dv = dv.data();
    p.dq_far = dq_far.size() > 0 ? dq_far.data() : nullptr;
    p.dk_far = dk_far.size() > 0 ? dk_far.data() : nullptr;
    p.dscores = dscores.data();
    p.dout_strides = p.fwd.out_strides;
    p.num_pool_rows = static_cast<int32_t>(rows.num_pool_rows);
    p.deterministic = deterministic;
    return p;
  }

  int64_t num_score_rows;
  Poisoned<int32_t> frac_begin, frac_end;
  Poisoned<T> dq, dk, dv, dq_far, dk_far;
  Poisoned<ScoreOf<T>> dscores;
};

// [batch, seqlen, num_heads, head_dim] of the queries of the rows.
template <class T>
Values query_rows(const Rows<T>& rows, const Values& gradient) {
  const int64_t row = rows.spec.num_heads * rows.spec.head_dim;
  Values result;
  for (int64_t b = 0; b < rows.spec.batch; ++b) {
    const auto begin = gradient.begin() + (b * rows.spec.seqlen + rows.chunk_begin) * row;
    result.insert(result.end(), begin, begin + rows.seqlen_q * row);
  }
  return result;
}

// [batch, seqlen_k, num_kv_heads, head_dim]: a position's gradient at its row, 0 at rows that nothing sees. A sink that
// is still in the window has two rows in a chunk's state; the one that is used has it all.
template <class T>
Values key_rows(const Rows<T>& rows, const Values& gradient) {
  const reference::Spec& s = rows.spec;
  Values result(rows.k.size(), 0.0);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.num_kv_heads; ++h) {
      for (int64_t r = 0; r < rows.seqlen_k; ++r) {
        const int64_t position = rows.positions[(b * s.num_kv_heads + h) * rows.seqlen_k + r];
        if (position < 0) continue;
        for (int64_t c = 0; c < s.head_dim; ++c) {
          result[((b * rows.seqlen_k + r) * s.num_kv_heads + h) * s.head_dim + c] =
              gradient[((b * s.seqlen + position) * s.num_kv_heads + h) * s.head_dim + c];
        }
      }
    }
  }
  return result;
}

template <class T>
Values score_rows(const Rows<T>& rows, const Values& dscores) {
  const reference::Spec& s = rows.spec;
  const int64_t num_rows = rows.num_pool_rows + rows.seqlen_k;
  Values result(s.batch * s.num_kv_heads * num_rows, 0.0);
  for (int64_t lane = 0; lane < s.batch * s.num_kv_heads; ++lane) {
    const auto set = [&](int64_t score_row, int64_t position) {
      result[lane * num_rows + score_row] =
          dscores[rows.source.score_index(lane / s.num_kv_heads, position, lane % s.num_kv_heads)];
    };
    const auto& pool = rows.pool_positions[lane];
    for (size_t n = 0; n < pool.size(); ++n) set(static_cast<int64_t>(n), pool[n]);
    for (int64_t r = 0; r < rows.seqlen_k; ++r) {
      const int64_t position = rows.positions[lane * rows.seqlen_k + r];
      if (position >= 0) set(rows.num_pool_rows + r, position);
    }
  }
  return result;
}

double typical_norm(const Values& values, int64_t row_size) {
  double sum = 0;
  for (double value : values) sum += value * value;
  return std::sqrt(sum / static_cast<double>(std::max<size_t>(1, values.size())) * static_cast<double>(row_size));
}

template <class T>
void check(const CaseOptions& options) {
  const Case<T> c(options);
  const reference::AttentionGradients expected = reference::attention_backward(c.inputs, c.dout, c.dlse, c.spec);
  on_every_isa(c, [&](Rows<T>& rows) {
    cpu::attention_forward(rows.forward());
    Gradients<T> g(rows);
    cpu::attention_backward(g.params(rows, true));
    // A row's gradient cancels (altogether where a query sees one key), so its error is measured against the typical
    // row and against the sums that cancel too.
    const double tolerance = sizeof(T) == 8 ? 1e-11 : sizeof(T) == 4 ? 1e-5 : 1.5e-2;
    const auto close = [&](const auto& actual, const Values& wanted, const char* what) {
      const double floor = tolerance * std::max(0.5, typical_norm(wanted, rows.spec.head_dim));
      EXPECT_TRUE(rows_close(actual, wanted, rows.spec.head_dim, tolerance, floor)) << what;
      EXPECT_FULLY_WRITTEN(actual);
      EXPECT_GUARDS_INTACT(actual);
    };
    close(g.dq, query_rows(rows, expected.dq), "dq");
    close(g.dk, key_rows(rows, expected.dk), "dk");
    close(g.dv, key_rows(rows, expected.dv), "dv");
    if (options.far_rotary) {
      close(g.dq_far, query_rows(rows, expected.dq_far), "dq_far");
      close(g.dk_far, key_rows(rows, expected.dk_far), "dk_far");
    }
    const Values dscores = score_rows(rows, expected.dscores);
    EXPECT_CLOSE_TO_MAXIMUM(g.dscores, dscores, tolerance);
    EXPECT_FULLY_WRITTEN(g.dscores);
    EXPECT_GUARDS_INTACT(g.dscores);
  });
}

void check_all(const CaseOptions& options) {
  in_every_type([&](auto type) { check<decltype(type)>(options); });
}
void check_all(const Cases& cases) {
  for (const CaseOptions& options : cases) check_all(options);
}

CaseOptions base(int64_t batch) {
  CaseOptions options = small_case();
  options.spec.batch = batch;
  options.with_dlse = true;
  return options;
}

TEST(AttentionBackward, HeadDims) {
  check_all(head_dim_cases(base(1)));
}
TEST(AttentionBackward, GroupsAndLengths) {
  CaseOptions options = base(1);
  options.with_dlse = false;
  check_all(group_cases(options));
}
TEST(AttentionBackward, ScoreKindsAndGates) {
  check_all(score_cases(base(1)));
}
TEST(AttentionBackward, FarRotary) {
  check_all(far_rotary_cases(base(1)));
}
TEST(AttentionBackward, CarriedRows) {
  check_all(carried_cases(base(2)));
}
TEST(AttentionBackward, PackedDocuments) {
  check_all(packed_case(base(1)));
}
TEST(AttentionBackward, EverySmallShape) {
  check_all(random_cases(base(1), 20240602, 30));
}

TEST(AttentionBackward, SameBitsEveryTime) {
  CaseOptions options = base(2);
  options.spec.seqlen = 700;
  options.spec.topk = 60;
  options.scores = ScoreKind::kRising;
  const Case<float> c(options);
  Rows<float> rows(c);
  cpu::attention_forward(rows.forward());
  Gradients<float> first(rows);
  cpu::attention_backward(first.params(rows, true));
  for (int repeat = 0; repeat < 5; ++repeat) {
    Gradients<float> again(rows);
    cpu::attention_backward(again.params(rows, true));
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    EXPECT_TRUE(same(first.dq, again.dq));
    EXPECT_TRUE(same(first.dk, again.dk));
    EXPECT_TRUE(same(first.dv, again.dv));
    EXPECT_TRUE(same(first.dscores, again.dscores));
  }
}

// Central differences of L = <dout, out> + <dlse, lse> in float64, the selection (tau moves with the scores only
// through the reference's backward) held fixed: q, k and v.
TEST(AttentionBackward, FiniteDifferences) {
  CaseOptions options = base(1);
  options.spec.seqlen = 60;
  options.spec.num_sinks = 1;
  options.far_rotary = true;
  const Case<double> c(options);
  Rows<double> rows(c);
  const auto loss = [&] {
    cpu::attention_forward(rows.forward());
    double sum = 0;
    for (int64_t n = 0; n < rows.out.size(); ++n) sum += rows.out[n] * rows.dout[n];
    for (int64_t n = 0; n < rows.softmax_lse.size(); ++n) sum += rows.softmax_lse[n] * rows.dlse[n];
    return sum;
  };
  loss();
  Gradients<double> g(rows);
  cpu::attention_backward(g.params(rows, false));
  const auto differ = [&](Poisoned<double>& values, const Poisoned<double>& gradient, const char* what) {
    for (int64_t n = 3; n < values.size(); n += 97) {
      if (!std::isfinite(values[n])) continue;
      const double saved = values[n], step = 1e-5;
      values[n] = saved + step;
      const double above = loss();
      values[n] = saved - step;
      const double below = loss();
      values[n] = saved;
      EXPECT_NEAR(gradient[n], (above - below) / (2 * step), 1e-7) << what << " " << n;
    }
  };
  differ(rows.q, g.dq, "q");
  differ(rows.k, g.dk, "k");
  differ(rows.v, g.dv, "v");
  differ(rows.q_far, g.dq_far, "q_far");
  differ(rows.k_far, g.dk_far, "k_far");
}

}  // namespace
}  // namespace sparsek::test
