// What must hold whatever the numbers are: causality, the dense limit, packed documents, keys that nobody may read,
// invariance to a constant in the scores, and repeatable bits.
#include <omp.h>

#include "tests/kernels/properties/gradient_limits.h"
#include "tests/kernels/properties/run_streaming.h"

namespace sparsek::test {
namespace {

template <class Element>
class Invariants : public ::testing::Test {};
using Elements = ::testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(Invariants, Elements);

Spec base_spec() {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 203;
  spec.num_heads = 6;
  spec.num_kv_heads = 3;
  spec.head_dim = 32;
  spec.topk = 20;
  spec.window_size = 17;
  spec.num_sinks = 3;
  spec.pool_size = 48;
  return spec;
}

// values[row_begin, row_end) of the first dimension that has rows of `row` elements.
Values slice(const Values& values, int64_t row, int64_t row_begin, int64_t row_end) {
  return {values.begin() + row_begin * row, values.begin() + row_end * row};
}

TYPED_TEST(Invariants, FutureTokensChangeNoPastOutput) {
  for_each_isa<TypeParam>([] {
    for (bool far_rotary : {false, true}) {
      Problem problem = make_problem<TypeParam>(base_spec(), ScoreKind::kNormal, far_rotary, 201);
      SCOPED_TRACE(problem.text);
      const Run before = run_whole<TypeParam>(problem);
      const int64_t T = problem.spec.seqlen;
      for (int64_t changed : {int64_t{1}, int64_t{64}, int64_t{150}, T - 1}) {
        Problem other = problem;
        AttentionInputs& in = other.inputs;
        for (Values* values : {&in.q, &in.k, &in.v, &in.q_far, &in.k_far, &in.scores}) {
          const int64_t row = static_cast<int64_t>(values->size()) / (2 * T);
          for (int64_t b = 0; b < 2; ++b) {
            for (int64_t n = (b * T + changed) * row; n < (b + 1) * T * row; ++n) (*values)[n] = 512 + 8 * (n % 7);
          }
        }
        const Run after = run_whole<TypeParam>(other);
        for (int64_t b = 0; b < 2; ++b) {
          const int64_t begin = b * T, end = b * T + changed;
          // Which tile a row shares with which later key may change the order of sums, nothing else.
          EXPECT_ROWS_CLOSE(slice(after.out, problem.q_row(), begin, end),
                            slice(before.out, problem.q_row(), begin, end), problem.spec.head_dim,
                            tolerance_of<TypeParam>().out);
          EXPECT_ALL_EQUAL(slice(after.tau, problem.spec.num_kv_heads, begin, end),
                           slice(before.tau, problem.spec.num_kv_heads, begin, end));
        }
      }
    }
  });
}

TYPED_TEST(Invariants, LargeBudgetIsDense) {
  for_each_isa<TypeParam>([] {
    for (Gate gate : {Gate::kSoft, Gate::kHard}) {
      Spec spec = base_spec();
      spec.gate = gate;
      spec.topk = spec.seqlen;
      spec.pool_size = 0;
      const Problem problem = make_problem<TypeParam>(spec, ScoreKind::kNormal, false, 202);
      SCOPED_TRACE(problem.text);
      Spec dense = problem.spec;  // a window over everything: no selection in it
      dense.window_size = dense.seqlen;
      dense.num_sinks = 0;
      expect_outputs<TypeParam>(run_whole<TypeParam>(problem), reference::attention_forward(problem.inputs, dense),
                                problem);
    }
  });
}

TYPED_TEST(Invariants, PackedDocumentsAreSeparate) {
  for_each_isa<TypeParam>([] {
    for (bool far_rotary : {false, true}) {
      for (ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kRising, ScoreKind::kTies}) {
        Spec spec = base_spec();
        spec.batch = 1;
        spec.cu_seqlens = {0, 1, 3, 70, 90, 154, 203};
        const Problem problem = make_problem<TypeParam>(spec, kind, far_rotary, 203);
        SCOPED_TRACE(problem.text);
        const Run packed = run_whole<TypeParam>(problem, Backward::kFast);
        expect_outputs<TypeParam>(packed, reference::attention_forward(problem.inputs, problem.spec), problem);
        expect_gradients<TypeParam>(
            packed.grad, reference::attention_backward(problem.inputs, problem.dout, problem.dlse, problem.spec),
            problem);
        for (size_t d = 0; d + 1 < spec.cu_seqlens.size(); ++d) {
          const int64_t begin = spec.cu_seqlens[d], end = spec.cu_seqlens[d + 1];
          Problem alone = problem;
          alone.spec.cu_seqlens = {};
          alone.spec.seqlen = end - begin;
          const AttentionInputs& in = problem.inputs;
          alone.inputs = {slice(in.q, problem.q_row(), begin, end), slice(in.k, problem.kv_row(), begin, end),
                          slice(in.v, problem.kv_row(), begin, end), slice(in.scores, spec.num_kv_heads, begin, end)};
          if (far_rotary) {
            alone.inputs.q_far = slice(in.q_far, problem.q_row(), begin, end);
            alone.inputs.k_far = slice(in.k_far, problem.kv_row(), begin, end);
          }
          const Run one = run_whole<TypeParam>(alone);
          EXPECT_ROWS_CLOSE(slice(packed.out, problem.q_row(), begin, end), one.out, spec.head_dim,
                            tolerance_of<TypeParam>().out);
          EXPECT_ALL_EQUAL(slice(packed.tau, spec.num_kv_heads, begin, end), one.tau);
        }
      }
    }
  });
}

// With far rotary a key that is never far may hold NaN in k_far. (That a row outside every window may hold NaN in k is
// in every chunk of streaming_test.)
TYPED_TEST(Invariants, UnreadKeysMayBeNan) {
  for_each_isa<TypeParam>([] {
    const Problem problem = make_problem<TypeParam>(base_spec(), ScoreKind::kNormal, true, 204);
    SCOPED_TRACE(problem.text);
    const Spec& spec = problem.spec;
    Problem poisoned = problem;
    const reference::Selection selection = reference::select(problem.inputs.scores, spec);
    int64_t num_unread = 0;
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
          const int64_t at = (b * spec.seqlen + j) * spec.num_kv_heads + h, leaves = j + spec.window_size;
          const bool is_far = leaves < spec.seqlen && (j < spec.num_sinks || selection.expiry[at] > leaves);
          if (is_far) continue;
          ++num_unread;
          for (int64_t d = 0; d < spec.head_dim; ++d) poisoned.inputs.k_far[at * spec.head_dim + d] = std::nan("");
        }
      }
    }
    EXPECT_GT(num_unread, 300);
    const Run run = run_whole<TypeParam>(poisoned, Backward::kFast);
    expect_outputs<TypeParam>(run, reference::attention_forward(problem.inputs, spec), problem);
    expect_gradients<TypeParam>(
        run.grad, reference::attention_backward(problem.inputs, problem.dout, problem.dlse, spec), problem);
  });
}

TYPED_TEST(Invariants, AConstantInTheScoresChangesNothing) {
  for_each_isa<TypeParam>([] {
    Problem problem = make_problem<TypeParam>(base_spec(), ScoreKind::kNormal, true, 205);
    for (double& u : problem.inputs.scores) u = std::round(u * 1024) / 1024;  // exact after the shift
    Problem shifted = problem;
    for (double& u : shifted.inputs.scores) u += 8;
    const Run a = run_whole<TypeParam>(problem), b = run_whole<TypeParam>(shifted);
    EXPECT_ROWS_CLOSE(b.out, a.out, problem.spec.head_dim, tolerance_of<TypeParam>().out);
    EXPECT_ELEMENTS_CLOSE(b.softmax_lse, a.softmax_lse, tolerance_of<TypeParam>().lse);
  });
}

// The score gradient of each (batch row, KV head) sums to zero.
TYPED_TEST(Invariants, ScoreGradientSumsToZero) {
  for_each_isa<TypeParam>([] {
    for (Gate gate : {Gate::kSoft, Gate::kHard}) {
      Spec spec = base_spec();
      spec.gate = gate;
      const Problem problem = make_problem<TypeParam>(spec, ScoreKind::kNormal, false, 206);
      const Run run = run_whole<TypeParam>(problem, Backward::kFast);
      for (int64_t b = 0; b < spec.batch; ++b) {
        for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
          double sum = 0, size = 0;
          for (int64_t t = 0; t < spec.seqlen; ++t) {
            const double du = run.grad.dscores[(b * spec.seqlen + t) * spec.num_kv_heads + h];
            sum += du;
            size += std::abs(du);
          }
          EXPECT_GT(size, 0);
          EXPECT_LE(std::abs(sum), 1e-5 * size);  // h of every precision is summed in float32 or better
        }
      }
    }
  });
}

void expect_same_bits(const Run& a, const Run& b) {
  EXPECT_ALL_EQUAL(a.out, b.out);
  EXPECT_ALL_EQUAL(a.softmax_lse, b.softmax_lse);
  EXPECT_ALL_EQUAL(a.grad.dq, b.grad.dq);
  EXPECT_ALL_EQUAL(a.grad.dk, b.grad.dk);
  EXPECT_ALL_EQUAL(a.grad.dv, b.grad.dv);
  EXPECT_ALL_EQUAL(a.grad.dq_far, b.grad.dq_far);
  EXPECT_ALL_EQUAL(a.grad.dk_far, b.grad.dk_far);
  EXPECT_ALL_EQUAL(a.grad.dscores, b.grad.dscores);
}

TYPED_TEST(Invariants, DeterministicBackwardRepeatsItsBits) {
  const int threads = omp_get_max_threads();
  for_each_isa<TypeParam>([] {
    for (int64_t kv_heads : {int64_t{3}, int64_t{1}}) {  // with one head, threads must share it
      Spec spec = base_spec();
      spec.num_kv_heads = kv_heads;
      spec.batch = kv_heads == 1 ? 1 : 2;
      spec.seqlen = 500;
      const Problem problem = make_problem<TypeParam>(spec, ScoreKind::kNormal, true, 207);
      SCOPED_TRACE(problem.text);
      omp_set_num_threads(2);
      const Run first = run_whole<TypeParam>(problem, Backward::kDeterministic);
      for (int repeat = 0; repeat < 20; ++repeat) {
        omp_set_num_threads(1 + repeat % 4);
        SCOPED_TRACE(fmt::format("repeat {} threads {}", repeat, 1 + repeat % 4));
        expect_same_bits(run_whole<TypeParam>(problem, Backward::kDeterministic), first);
        if (::testing::Test::HasFailure()) return;
      }
    }
  });
  omp_set_num_threads(threads);
}

TYPED_TEST(Invariants, PermutedBatchRowsGivePermutedBits) {
  for_each_isa<TypeParam>([] {
    const Problem problem = make_problem<TypeParam>(base_spec(), ScoreKind::kNormal, true, 208);
    Problem swapped = problem;
    const auto swap_halves = [](Values& values) {
      std::rotate(values.begin(), values.begin() + values.size() / 2, values.end());
    };
    AttentionInputs& in = swapped.inputs;
    for (Values* values : {&in.q, &in.k, &in.v, &in.q_far, &in.k_far, &in.scores, &swapped.dout, &swapped.dlse}) {
      swap_halves(*values);
    }
    Run run = run_whole<TypeParam>(swapped, Backward::kDeterministic);
    for (Values* values : {&run.out, &run.softmax_lse, &run.grad.dq, &run.grad.dk, &run.grad.dv, &run.grad.dq_far,
                           &run.grad.dk_far, &run.grad.dscores}) {
      swap_halves(*values);
    }
    expect_same_bits(run, run_whole<TypeParam>(problem, Backward::kDeterministic));
  });
}

}  // namespace
}  // namespace sparsek::test
