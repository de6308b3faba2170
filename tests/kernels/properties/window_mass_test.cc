// eq. 1b: the sums of window_mass over whole sequences and chunks, and those of decode_step, against the reference.
#include "tests/kernels/properties/problems.h"
#include "tests/kernels/properties/run_streaming.h"

namespace sparsek::test {
namespace {

template <class Element>
class WindowMass : public ::testing::Test {};
using Elements = ::testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(WindowMass, Elements);

template <class Element>
constexpr double kMassTolerance = std::is_same_v<Element, double>  ? 1e-12
                                  : std::is_same_v<Element, float> ? 2e-6
                                                                   : 2e-6;

template <class Element>
WindowMassParams common_mass_params(const Spec& spec) {
  WindowMassParams params{};
  params.dtype = dtype_of<Element>();
  params.batch = static_cast<int32_t>(spec.batch);
  params.num_heads = static_cast<int32_t>(spec.num_heads);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.head_dim = static_cast<int32_t>(spec.head_dim);
  params.window_size = static_cast<int32_t>(spec.window_size);
  params.softmax_scale = spec.softmax_scale;
  return params;
}

// [batch, seqlen, num_kv_heads]; num_queries, if given, takes window_rows' counts [batch, seqlen].
template <class Element>
Values whole_mass(const Problem& problem, Indices* num_queries) {
  const Spec& spec = problem.spec;
  const Storage<Element> in(problem);
  const bool far_rotary = !in.q_far.empty();
  const int64_t tokens = spec.batch * spec.seqlen;
  const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
  Poisoned<int32_t> window_begin(tokens), far_begin(tokens), far_end(tokens), counts(tokens);
  WindowRowsParams rows{};
  rows.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  rows.window_begin = window_begin.data();
  rows.far_begin = far_begin.data();
  rows.far_end = far_end.data();
  rows.num_queries = counts.data();
  rows.batch = static_cast<int32_t>(spec.batch);
  rows.seqlen = static_cast<int32_t>(spec.seqlen);
  rows.num_documents = cu_seqlens.empty() ? 1 : static_cast<int32_t>(cu_seqlens.size()) - 1;
  rows.window_size = static_cast<int32_t>(spec.window_size);
  rows.num_sinks = static_cast<int32_t>(spec.num_sinks);
  cpu::window_rows(rows);
  for (const Poisoned<int32_t>* buffer : {&window_begin, &far_begin, &far_end, &counts}) {
    EXPECT_GUARDS_INTACT(*buffer);
    EXPECT_FULLY_WRITTEN(*buffer);
  }
  num_queries->assign(counts.data(), counts.data() + tokens);

  Poisoned<ScoreOf<Element>> mass(tokens * spec.num_kv_heads);
  WindowMassParams params = common_mass_params<Element>(spec);
  params.q = in.q.data();
  params.k = in.k.data();
  params.q_far = far_rotary ? in.q_far.data() : nullptr;
  params.k_far = far_rotary ? in.k_far.data() : nullptr;
  params.window_begin = window_begin.data();
  params.far_begin = far_begin.data();
  params.far_end = far_end.data();
  params.mass = mass.data();
  params.q_strides = params.q_far_strides = contiguous(spec.seqlen, spec.num_heads, spec.head_dim);
  params.k_strides = params.k_far_strides = contiguous(spec.seqlen, spec.num_kv_heads, spec.head_dim);
  params.seqlen_q = params.seqlen_k = static_cast<int32_t>(spec.seqlen);
  cpu::window_mass(params);
  EXPECT_GUARDS_INTACT(mass);
  Values result(mass.size());
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t t = 0; t < spec.seqlen; ++t) {
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        result[(b * spec.seqlen + t) * spec.num_kv_heads + h] =
            static_cast<double>(mass[(b * spec.num_kv_heads + h) * spec.seqlen + t]);
      }
    }
  }
  return result;
}

// Rows of a chunk: [ sinks | ring in position order | chunk ]; keys that are in no window are NaN in k.
template <class Element>
Values chunked_mass(const Problem& problem, const Indices& sizes) {
  using Score = ScoreOf<Element>;
  const Spec& spec = problem.spec;
  const Storage<Element> in(problem);
  const bool far_rotary = !in.q_far.empty();
  const int64_t dim = spec.head_dim, kv_heads = spec.num_kv_heads, carried = spec.num_sinks + spec.window_size;
  const Element poison = poison_value<Element>(), zero = to_storage<Element>({0.0})[0];
  Values result(in.scores.size(), 0.0);  // by position, carried from chunk to chunk
  int64_t length = 0;
  for (int64_t chunk : sizes) {
    const int64_t num_rows = carried + chunk;
    const std::vector<int64_t> lengths(spec.batch, length);
    Poisoned<int32_t> window_begin(spec.batch * chunk), far_begin(spec.batch * num_rows),
        far_end(spec.batch * num_rows);
    WindowRowsParams rows{};
    rows.lengths = lengths.data();
    rows.window_begin = window_begin.data();
    rows.far_begin = far_begin.data();
    rows.far_end = far_end.data();
    rows.batch = static_cast<int32_t>(spec.batch);
    rows.seqlen = static_cast<int32_t>(chunk);
    rows.num_documents = 1;
    rows.window_size = static_cast<int32_t>(spec.window_size);
    rows.num_sinks = static_cast<int32_t>(spec.num_sinks);
    cpu::window_rows(rows);
    Poisoned<Element> k(spec.batch * num_rows * problem.kv_row()), k_far(spec.batch * num_rows * problem.kv_row());
    Poisoned<Score> mass_in(spec.batch * kv_heads * num_rows), mass(spec.batch * kv_heads * num_rows);
    const auto position_of = [&](int64_t r) {
      const int64_t position = r < spec.num_sinks ? r : length + r - carried;
      return r < spec.num_sinks && position >= length ? -1 : position;
    };
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t position = position_of(r);
        const bool is_far = far_begin[b * num_rows + r] < far_end[b * num_rows + r];
        for (int64_t h = 0; h < kv_heads; ++h) {
          for (int64_t d = 0; d < dim; ++d) {
            const int64_t to = ((b * num_rows + r) * kv_heads + h) * dim + d;
            const int64_t from = ((b * spec.seqlen + position) * kv_heads + h) * dim + d;
            if (!far_rotary) {
              k[to] = position < 0 ? zero : in.k[from];
            } else {
              k[to] = position >= 0 && r >= spec.num_sinks ? in.k[from] : poison;
              k_far[to] = position >= 0 && is_far ? in.k_far[from] : poison;
            }
          }
          const bool in_ring = r >= spec.num_sinks && r < carried && position >= 0;
          const int64_t at = (b * spec.seqlen + position) * kv_heads + h;
          mass_in[(b * kv_heads + h) * num_rows + r] = in_ring ? static_cast<Score>(result[at]) : 0;
        }
      }
    }
    WindowMassParams params = common_mass_params<Element>(spec);
    params.q = in.q.data() + length * problem.q_row();
    params.k = k.data();
    params.q_far = far_rotary ? in.q_far.data() + length * problem.q_row() : nullptr;
    params.k_far = far_rotary ? k_far.data() : nullptr;
    params.window_begin = window_begin.data();
    params.far_begin = far_begin.data();
    params.far_end = far_end.data();
    params.mass_in = length == 0 ? nullptr : mass_in.data();
    params.mass = mass.data();
    params.q_strides = params.q_far_strides = contiguous(spec.seqlen, spec.num_heads, dim);
    params.k_strides = params.k_far_strides = contiguous(num_rows, kv_heads, dim);
    params.seqlen_q = static_cast<int32_t>(chunk);
    params.seqlen_k = static_cast<int32_t>(num_rows);
    params.num_carried = static_cast<int32_t>(carried);
    cpu::window_mass(params);
    EXPECT_GUARDS_INTACT(mass);
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t r = spec.num_sinks; r < num_rows; ++r) {
        const int64_t position = position_of(r);
        for (int64_t h = 0; h < kv_heads && position >= 0; ++h) {
          result[(b * spec.seqlen + position) * kv_heads + h] =
              static_cast<double>(mass[(b * kv_heads + h) * num_rows + r]);
        }
      }
    }
    length += chunk;
  }
  return result;
}

TYPED_TEST(WindowMass, WholeAndChunksEqualTheReference) {
  for_each_isa<TypeParam>([] {
    for_each_problem<TypeParam>([](const Problem& problem) {
      const reference::WindowMass expected = reference::window_mass(problem.inputs, problem.spec);
      Indices num_queries;
      const Values whole = whole_mass<TypeParam>(problem, &num_queries);
      EXPECT_ELEMENTS_CLOSE(whole, expected.mass, kMassTolerance<TypeParam>);
      Values y(whole.size());
      for (size_t n = 0; n < y.size(); ++n) {
        const double count = static_cast<double>(num_queries[n / problem.spec.num_kv_heads]);
        y[n] = std::log(1e-9 + (count > 0 ? whole[n] / count : 0));
      }
      EXPECT_ELEMENTS_CLOSE(y, expected.y, 1e-4);
      for (const Indices& sizes : chunkings(problem.spec, problem.spec.pool_size)) {
        SCOPED_TRACE(fmt::format("chunks {} .. {} ({})", sizes.front(), sizes.back(), sizes.size()));
        EXPECT_ELEMENTS_CLOSE(chunked_mass<TypeParam>(problem, sizes), expected.mass, kMassTolerance<TypeParam>);
      }
    });
  });
}

TYPED_TEST(WindowMass, PackedDocumentsEqualTheReference) {
  for_each_isa<TypeParam>([] {
    Spec spec = specs()[0];
    spec.batch = 1;
    spec.cu_seqlens = {0, 1, 12, 80, 151};
    const Problem problem = make_problem<TypeParam>(spec, ScoreKind::kNormal, true, 91);
    SCOPED_TRACE(problem.text);
    Indices num_queries;
    EXPECT_ELEMENTS_CLOSE(whole_mass<TypeParam>(problem, &num_queries),
                          reference::window_mass(problem.inputs, problem.spec).mass, kMassTolerance<TypeParam>);
  });
}

TYPED_TEST(WindowMass, DecodeEqualsTheReference) {
  for_each_isa<TypeParam>([] {
    for_each_problem<TypeParam>([](const Problem& problem) {
      const Spec& spec = problem.spec;
      const reference::WindowMass expected = reference::window_mass(problem.inputs, spec);
      StreamingRun<TypeParam> streaming(problem);
      streaming.decode(spec.seqlen);
      for (int64_t b = 0; b < spec.batch; ++b) {
        const int64_t row = spec.num_kv_heads, begin = b * spec.seqlen * row;
        const int64_t end = begin + std::max<int64_t>(0, spec.seqlen - spec.window_size) * row;  // keys that left
        EXPECT_ELEMENTS_CLOSE((Values{streaming.run().mass.begin() + begin, streaming.run().mass.begin() + end}),
                              (Values{expected.mass.begin() + begin, expected.mass.begin() + end}),
                              kMassTolerance<TypeParam>);
      }
    });
  });
}

}  // namespace
}  // namespace sparsek::test
