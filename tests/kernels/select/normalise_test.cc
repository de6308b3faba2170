// Score normalisation against kernels/reference, in parts against in one go, and its gradient by central differences.
#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "base/error.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::NormaliseOptions;
using reference::Spec;

constexpr int64_t kHeads = 3;

NormaliseOptions make_options(bool timestep_norm) {
  return {{0.3, -0.2, 1.5}, {1.25, 0.5, -2}, {0, 2, 40.5}, timestep_norm};
}

struct Normalised {
  Values scores, stats;
};

// raw: [batch, seqlen, kHeads]; stats_in: [batch, kHeads, 3] or empty.
template <class T>
struct NormaliseCall {
  NormaliseCall(const Values& raw_values, const NormaliseOptions& options, const Spec& spec, const Values& stats_values)
      : raw(raw_values.begin(), raw_values.end()),
        beta(options.beta.begin(), options.beta.end()),
        gamma(options.gamma.begin(), options.gamma.end()),
        slope(options.slope.begin(), options.slope.end()),
        stats_in(stats_values),
        cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end()) {
    params.dtype = kDType<T>;
    params.raw = raw.data();
    params.beta = beta.data();
    params.gamma = gamma.data();
    params.slope = slope.data();
    params.stats_in = stats_in.empty() ? nullptr : stats_in.data();
    params.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    params.raw_strides = params.scores_strides = contiguous(spec.seqlen, kHeads);
    params.batch = static_cast<int32_t>(spec.batch);
    params.seqlen = static_cast<int32_t>(spec.seqlen);
    params.num_kv_heads = kHeads;
    params.num_documents = cu_seqlens.empty() ? 0 : static_cast<int32_t>(cu_seqlens.size()) - 1;
    params.timestep_norm = options.timestep_norm;
  }
  std::vector<T> raw, beta, gamma, slope;
  Values stats_in;
  std::vector<int32_t> cu_seqlens;
  NormaliseParams params{};
};

template <class T>
Normalised run_normalise(const Values& raw, const NormaliseOptions& options, const Spec& spec,
                         const Values& stats_in = {}) {
  NormaliseCall<T> call(raw, options, spec, stats_in);
  Poisoned<T> scores(static_cast<int64_t>(raw.size()));
  Poisoned<double> stats(spec.batch * kHeads * 3);
  call.params.scores = scores.data();
  call.params.stats = stats.data();
  cpu::normalise_scores(call.params);
  EXPECT_FULLY_WRITTEN(scores);
  EXPECT_FULLY_WRITTEN(stats);
  EXPECT_GUARDS_INTACT(scores);
  EXPECT_GUARDS_INTACT(stats);
  const std::vector<T> result = scores.to_vector();
  return {Values(result.begin(), result.end()), stats.to_vector()};
}

struct Gradients {
  Values draw, dbeta, dgamma, dslope, dstats_in;
};

template <class T>
Gradients run_backward(const Values& raw, const NormaliseOptions& options, const Spec& spec, const Values& stats_in,
                       const Values& dscores_values, const Values& dstats) {
  NormaliseCall<T> call(raw, options, spec, stats_in);
  const std::vector<T> dscores(dscores_values.begin(), dscores_values.end());
  Poisoned<T> draw(static_cast<int64_t>(raw.size())), dbeta(kHeads), dgamma(kHeads), dslope(kHeads);
  Poisoned<double> dstats_in(spec.batch * kHeads * 3);
  NormaliseBwdParams params{};
  params.fwd = call.params;
  params.dscores = dscores.data();
  params.dstats = dstats.empty() ? nullptr : dstats.data();
  params.draw = draw.data();
  params.dbeta = dbeta.data();
  params.dgamma = dgamma.data();
  params.dslope = dslope.data();
  params.dstats_in = dstats_in.data();
  params.dscores_strides = call.params.scores_strides;
  cpu::normalise_scores_backward(params);
  EXPECT_FULLY_WRITTEN(draw);
  EXPECT_FULLY_WRITTEN(dbeta);
  EXPECT_FULLY_WRITTEN(dgamma);
  EXPECT_FULLY_WRITTEN(dslope);
  EXPECT_FULLY_WRITTEN(dstats_in);
  EXPECT_GUARDS_INTACT(draw);
  const auto doubles = [](const Poisoned<T>& buffer) {
    const std::vector<T> values = buffer.to_vector();
    return Values(values.begin(), values.end());
  };
  return {doubles(draw), doubles(dbeta), doubles(dgamma), doubles(dslope), dstats_in.to_vector()};
}

std::vector<Spec> all_specs() {
  std::vector<Spec> specs;
  for (const int64_t seqlen : {1, 2, 67, 300}) {
    Spec spec;
    spec.batch = 2;
    spec.seqlen = seqlen;
    spec.num_kv_heads = kHeads;
    specs.push_back(spec);
  }
  Spec packed;
  packed.seqlen = 90;
  packed.num_kv_heads = kHeads;
  packed.cu_seqlens = {0, 1, 40, 42, 90};
  specs.push_back(packed);
  return specs;
}

TEST(Normalise, EqualsReference) {
  for (const Spec& spec : all_specs()) {
    for (const bool timestep_norm : {true, false}) {
      for (const double mean : {0.0, 30.0, -3000.0}) {
        const NormaliseOptions options = make_options(timestep_norm);
        const Values raw = round_to_f32(normal(spec.batch * spec.seqlen * kHeads, 3, 0.4, mean));
        const Values expected = reference::normalise_scores(raw, options, spec);
        EXPECT_ELEMENTS_CLOSE(run_normalise<double>(raw, options, spec).scores, expected, 1e-11 * (1 + std::abs(mean)));
        EXPECT_ELEMENTS_CLOSE(run_normalise<float>(raw, options, spec).scores, expected, 2e-7);
      }
    }
  }
}

TEST(Normalise, PartsContinueTheSequence) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 211;
  spec.num_kv_heads = kHeads;
  for (const bool timestep_norm : {true, false}) {
    const NormaliseOptions options = make_options(timestep_norm);
    const Values raw = normal(2 * 211 * kHeads, 4, 2.0, 1.0);
    const Normalised whole = run_normalise<double>(raw, options, spec);
    Values scores(raw.size()), stats;
    for (int64_t begin = 0, chunk = 1; begin < spec.seqlen; begin += chunk, chunk = 2 * chunk + 1) {
      Spec part = spec;
      part.seqlen = std::min(chunk, spec.seqlen - begin);
      Values raw_part;
      for (int64_t b = 0; b < 2; ++b) {
        const auto first = raw.begin() + (b * 211 + begin) * kHeads;
        raw_part.insert(raw_part.end(), first, first + part.seqlen * kHeads);
      }
      const Normalised result = run_normalise<double>(raw_part, options, part, stats);
      stats = result.stats;
      for (int64_t b = 0; b < 2; ++b) {
        const auto first = result.scores.begin() + b * part.seqlen * kHeads;
        std::copy(first, first + part.seqlen * kHeads, scores.begin() + (b * 211 + begin) * kHeads);
      }
    }
    EXPECT_ALL_EQUAL(scores, whole.scores);
    EXPECT_ALL_EQUAL(stats, whole.stats);
    EXPECT_EQ(stats[0], 211);
  }
}

// loss = <dscores, scores> + <dstats, (mean, M2)> as a function of one perturbed input.
TEST(Normalise, GradientEqualsCentralDifferences) {
  for (const Spec& spec : all_specs()) {
    if (spec.seqlen > 100) continue;
    for (const bool timestep_norm : {true, false}) {
      for (const bool continued : {false, true}) {
        if (continued && !spec.cu_seqlens.empty()) continue;
        NormaliseOptions options = make_options(timestep_norm);
        const int64_t size = spec.batch * spec.seqlen * kHeads, num_stats = spec.batch * kHeads * 3;
        Values raw = normal(size, 5, 0.7, 0.4), stats_in;
        const Values dscores = normal(size, 6), dstats = normal(num_stats, 7);
        if (continued) {
          stats_in = uniform(num_stats, 8, 1, 2);
          for (int64_t n = 0; n < num_stats; n += 3) stats_in[n] = static_cast<double>(5 + n);
        }
        const auto loss = [&] {
          const Normalised result = run_normalise<double>(raw, options, spec, stats_in);
          double sum = 0;
          for (int64_t n = 0; n < size; ++n) sum += dscores[n] * result.scores[n];
          for (int64_t n = 0; n < num_stats; ++n) sum += n % 3 ? dstats[n] * result.stats[n] : 0;
          return sum;
        };
        const auto differences = [&](Values& input) {
          Values result;
          for (double& x : input) {
            const double saved = x, step = 1e-6;
            x = saved + step;
            const double above = loss();
            x = saved - step;
            result.push_back((above - loss()) / (2 * step));
            x = saved;
          }
          return result;
        };
        const Gradients actual = run_backward<double>(raw, options, spec, stats_in, dscores, dstats);
        // seqlen 1 divides by sqrt(1e-5): second derivatives of 1e5 stand in the differences.
        const double tolerance = 2e-7;
        EXPECT_CLOSE_TO_MAXIMUM(actual.draw, differences(raw), tolerance);
        EXPECT_CLOSE_TO_MAXIMUM(actual.dbeta, differences(options.beta), tolerance);
        EXPECT_CLOSE_TO_MAXIMUM(actual.dgamma, differences(options.gamma), tolerance);
        EXPECT_CLOSE_TO_MAXIMUM(actual.dslope, differences(options.slope), tolerance);
        if (!continued) continue;
        Values dstats_in = differences(stats_in);
        for (int64_t n = 0; n < num_stats; n += 3) dstats_in[n] = 0;  // the count has no gradient
        EXPECT_CLOSE_TO_MAXIMUM(actual.dstats_in, dstats_in, tolerance);
      }
    }
  }
}

TEST(Normalise, GradientEqualsReference) {
  for (const Spec& spec : all_specs()) {
    for (const bool timestep_norm : {true, false}) {
      const NormaliseOptions options = make_options(timestep_norm);
      const int64_t size = spec.batch * spec.seqlen * kHeads;
      const Values raw = round_to_f32(normal(size, 9, 0.7, 30)), dscores = round_to_f32(normal(size, 10));
      const auto expected = reference::normalise_scores_backward(raw, dscores, options, spec);
      const Gradients in_double = run_backward<double>(raw, options, spec, {}, dscores, {});
      const Gradients in_float = run_backward<float>(raw, options, spec, {}, dscores, {});
      EXPECT_CLOSE_TO_MAXIMUM(in_double.draw, expected.draw, 1e-9);
      EXPECT_CLOSE_TO_MAXIMUM(in_double.dgamma, expected.dgamma, 1e-9);
      EXPECT_CLOSE_TO_MAXIMUM(in_double.dbeta, expected.dbeta, 1e-9);
      EXPECT_CLOSE_TO_MAXIMUM(in_double.dslope, expected.dslope, 1e-9);
      EXPECT_CLOSE_TO_MAXIMUM(in_float.draw, expected.draw, 2e-7);
      EXPECT_CLOSE_TO_MAXIMUM(in_float.dgamma, expected.dgamma, 2e-7);
    }
  }
}

TEST(Normalise, NamesTheScoreThatIsNotFinite) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = 9;
  Values raw(2 * 9 * kHeads, 1.0);
  raw[(9 + 4) * kHeads + 1] = -std::numeric_limits<double>::infinity();
  for (const bool timestep_norm : {true, false}) {
    std::string message;
    try {
      run_normalise<float>(raw, make_options(timestep_norm), spec);
    } catch (const DataError& error) {
      message = error.what();
    }
    EXPECT_EQ(message, "raw scores must be finite, got -inf at batch row 1, position 4, head 1");
  }
}

}  // namespace
}  // namespace sparsek::test
