// window_mass against kernels/reference on every instruction set of this processor.
#include "kernels/cpu/attention/attention.h"
#include "tests/kernels/attention/cases.h"

namespace sparsek::test {
namespace {

template <class T>
void check(const CaseOptions& options, double logit_scale = 1) {
  Case<T> c(options);
  for (double& x : c.inputs.q) x *= logit_scale;  // a power of two: still of type T
  for (double& x : c.inputs.q_far) x *= logit_scale;
  const reference::WindowMass expected = reference::window_mass(c.inputs, c.spec);
  on_every_isa(c, [&](Rows<T>& rows) {
    const reference::Spec& s = rows.spec;
    const AttentionFwdParams f = rows.forward();
    Poisoned<int32_t> far_begin(s.batch * rows.seqlen_k), far_end(far_begin.size());
    Poisoned<ScoreOf<T>> mass_in(s.batch * s.num_kv_heads * rows.seqlen_k), mass(mass_in.size());
    std::vector<double> wanted(mass.size(), 0.0);
    for (int64_t n = 0; n < mass_in.size(); ++n)
      mass_in[n] = static_cast<ScoreOf<T>>(0.25 * static_cast<double>(n % 5));
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t r = 0; r < rows.seqlen_k; ++r) {
        const int64_t lane = b * s.num_kv_heads * rows.seqlen_k + r, n = b * rows.seqlen_k + r;
        const int64_t position = rows.positions[lane];
        const bool is_sink = position >= 0 && position - rows.document(position).begin < s.num_sinks;
        far_begin[n] = rows.far_begin[lane];
        far_end[n] = is_sink ? rows.far_end[lane] : far_begin[n];
        for (int64_t h = 0; h < s.num_kv_heads; ++h) {
          const int64_t to = (b * s.num_kv_heads + h) * rows.seqlen_k + r;
          wanted[to] = as_double(mass_in[to]);
          // The reference's mass is over all queries: whole sequences only.
          if (position >= 0) wanted[to] += expected.mass[c.score_index(b, position, h)];
        }
      }
    }
    WindowMassParams p{};
    p.dtype = f.dtype;
    p.q = f.q;
    p.k = f.k;
    p.q_far = f.q_far;
    p.k_far = f.k_far;
    p.window_begin = f.window_begin;
    p.far_begin = far_begin.data();
    p.far_end = far_end.data();
    p.mass_in = mass_in.data();
    p.mass = mass.data();
    p.q_strides = f.q_strides;
    p.k_strides = f.k_strides;
    p.q_far_strides = f.q_far_strides;
    p.k_far_strides = f.k_far_strides;
    p.batch = f.batch;
    p.seqlen_q = f.seqlen_q;
    p.seqlen_k = f.seqlen_k;
    p.num_carried = f.num_carried;
    p.num_heads = f.num_heads;
    p.num_kv_heads = f.num_kv_heads;
    p.head_dim = f.head_dim;
    p.window_size = static_cast<int32_t>(s.window_size);
    p.softmax_scale = f.softmax_scale;
    cpu::window_mass(p);
    EXPECT_FULLY_WRITTEN(mass);
    EXPECT_GUARDS_INTACT(mass);
    const double tolerance = (sizeof(T) == 8 ? 1e-12 : 1e-5) * logit_scale;
    EXPECT_ELEMENTS_CLOSE(mass, wanted, tolerance);
  });
}

void check_all(const CaseOptions& options, double logit_scale = 1) {
  in_every_type([&](auto type) { check<decltype(type)>(options, logit_scale); });
}

CaseOptions base() {
  CaseOptions options = small_case();
  options.spec.topk = 1;  // nothing here depends on the selection
  return options;
}

TEST(WindowMass, Windows) {
  for (int64_t window : {1, 2, 3, 31, 32, 33, 64, 111, 200}) {
    for (bool far_rotary : {false, true}) {
      CaseOptions options = base();
      options.what = fmt::format("window {}{}", window, far_rotary ? ", far rotary" : "");
      options.spec.window_size = window;
      options.spec.seqlen = 307;
      options.far_rotary = far_rotary;
      check_all(options);
    }
  }
}

TEST(WindowMass, HeadsAndLengths) {
  CaseOptions options = base();
  options.spec.window_size = 21;
  options.spec.head_dim = 24;
  for (const CaseOptions& group : group_cases(options)) check_all(group);
}

TEST(WindowMass, PackedDocuments) {
  check_all(packed_case(base()));
}

// Logits of hundreds: no shift but the running maximum keeps the exponentials finite.
TEST(WindowMass, LargeLogits) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    CaseOptions options = base();
    options.what = "large logits";
    options.seed = seed;
    options.spec.seqlen = 400;
    options.spec.window_size = 190;
    check_all(options, 256);
  }
}

}  // namespace
}  // namespace sparsek::test
