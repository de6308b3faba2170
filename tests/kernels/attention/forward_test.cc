// attention_forward against kernels/reference, row by row, on every instruction set of this processor.
#include <random>

#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/attention/plan.h"
#include "tests/kernels/attention/attention_case.h"
#include "tests/kernels/attention/isas.h"

namespace sparsek::test {
namespace {

using cpu::Isa;

// What a plain evaluation in bfloat16 gives: probabilities and gates in double, P rounded to bfloat16, the rest exact.
// Rows of head_dim. The reference's own out when P is not rounded.
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

template <class T>
void check(const CaseOptions& options) {
  const Case<T> c(options);
  const reference::AttentionOutputs reference = reference::attention_forward(c.inputs, c.spec);
  for (Isa isa : isas()) {
    if (sizeof(T) == 8 && isa != Isa::kPortable) continue;
    cpu::force_isa(isa);
    SCOPED_TRACE(fmt::format("{}, {}, {}, seed {}", options.what, name(kDTypeOf<T>), cpu::name(isa), options.seed));
    Rows<T> rows(c);
    const Expected expected = expected_rows(rows, reference);
    const AttentionFwdParams p = rows.forward();
    cpu::attention_forward(p);
    const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 1.2e-2;
    const double lse_tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 5e-6 : 1e-5;
    EXPECT_FULLY_WRITTEN(rows.out);
    EXPECT_FULLY_WRITTEN(rows.softmax_lse);
    EXPECT_GUARDS_INTACT(rows.out);
    EXPECT_GUARDS_INTACT(rows.softmax_lse);
    EXPECT_ROWS_CLOSE(rows.out, expected.out, rows.spec.head_dim, tolerance);
    EXPECT_ELEMENTS_CLOSE(rows.softmax_lse, expected.softmax_lse, lse_tolerance);
  }
  cpu::force_isa(cpu::best_isa());
}

void check_all(const CaseOptions& options) {
  check<float>(options);
  check<BFloat16>(options);
  check<double>(options);
}

CaseOptions base() {
  CaseOptions options;
  options.spec = {.batch = 2,
                  .seqlen = 150,
                  .num_heads = 6,
                  .num_kv_heads = 2,
                  .head_dim = 16,
                  .topk = 12,
                  .window_size = 9,
                  .num_sinks = 2,
                  .softmax_scale = 0.25};
  return options;
}

TEST(AttentionForward, HeadDims) {
  for (int64_t head_dim : {8, 24, 64, 80, 128, 256}) {
    CaseOptions options = base();
    options.what = fmt::format("head_dim {}", head_dim);
    options.spec.head_dim = head_dim;
    options.spec.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
    check_all(options);
  }
}

TEST(AttentionForward, GroupsAndLengths) {
  for (int64_t group : {1, 2, 3, 4, 7, 9}) {
    for (int64_t seqlen : lengths_around(cpu::tile_queries(static_cast<int32_t>(group)))) {
      CaseOptions options = base();
      options.what = fmt::format("{} heads a group, length {}", group, seqlen);
      options.spec.num_heads = 2 * group;
      options.spec.seqlen = seqlen;
      check_all(options);
    }
  }
}

TEST(AttentionForward, ScoreKindsAndGates) {
  for (ScoreKind kind : kAllScoreKinds) {
    for (Gate gate : {Gate::kSoft, Gate::kHard}) {
      CaseOptions options = base();
      options.what = fmt::format("{}, {}", name(kind), gate == Gate::kSoft ? "soft" : "hard");
      options.scores = kind;
      options.spec.gate = gate;
      options.spec.seqlen = 401;  // several runs of tiles
      options.spec.topk = 70;
      options.spec.pool_size = 90;
      options.spec.window_size = 37;
      check_all(options);
    }
  }
}

TEST(AttentionForward, FarRotary) {
  for (int64_t window : {1, 5, 64, 200}) {
    CaseOptions options = base();
    options.what = fmt::format("far rotary, window {}", window);
    options.far_rotary = true;
    options.spec.window_size = window;
    options.spec.topk = 40;
    options.spec.seqlen = 313;
    check_all(options);
  }
}

TEST(AttentionForward, CarriedRows) {
  for (int64_t chunk_begin : {1, 8, 63, 149, 200}) {
    for (bool far_rotary : {false, true}) {
      CaseOptions options = base();
      options.what = fmt::format("chunk from {}{}", chunk_begin, far_rotary ? ", far rotary" : "");
      options.chunk_begin = chunk_begin;
      options.far_rotary = far_rotary;
      options.spec.seqlen = 291;
      options.spec.topk = 33;
      check_all(options);
    }
  }
}

TEST(AttentionForward, PackedDocuments) {
  CaseOptions options = base();
  options.what = "packed";
  options.spec.batch = 1;
  options.spec.seqlen = 300;
  options.spec.cu_seqlens = {0, 1, 40, 41, 170, 300};
  check_all(options);
}

TEST(AttentionForward, EverySmallShape) {
  std::mt19937_64 random(20240601);
  const auto pick = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % (high - low + 1)); };
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    CaseOptions options = base();
    options.seed = seed;
    options.what = "random shape";
    options.spec.batch = pick(1, 2);
    options.spec.num_kv_heads = pick(1, 3);
    options.spec.num_heads = options.spec.num_kv_heads * pick(1, 5);
    options.spec.head_dim = 8 * pick(1, 6);
    options.spec.seqlen = pick(1, 260);
    options.spec.topk = pick(1, 80);
    options.spec.window_size = pick(1, 100);
    options.spec.num_sinks = pick(0, 6);
    options.spec.pool_size = pick(0, 1) * (options.spec.topk + pick(1, 30));
    options.scores = kAllScoreKinds[seed % std::size(kAllScoreKinds)];
    options.far_rotary = pick(0, 1);
    options.chunk_begin = pick(0, 1) * pick(0, options.spec.seqlen - 1);
    check_all(options);
  }
}

}  // namespace
}  // namespace sparsek::test
