// eq. 1: the reference against Welford's recurrence, known values, and its gradient against central differences.
#include <cmath>

#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek {
namespace {

using reference::NormaliseGradients;
using reference::NormaliseOptions;
using reference::Spec;
using reference::Values;

const NormaliseOptions kOptions{{0.3, -1.0}, {1.5, 0.25}, {0.0, 3.0}, true};

Spec spec_of(int64_t batch, int64_t seqlen, reference::Indices cu_seqlens = {}) {
  Spec spec;
  spec.batch = batch;
  spec.seqlen = seqlen;
  spec.num_heads = spec.num_kv_heads = 2;
  spec.cu_seqlens = cu_seqlens;
  return spec;
}

TEST(Normalise, KnownValues) {
  Spec spec = spec_of(1, 3);
  spec.num_kv_heads = 1;
  const Values scores = reference::normalise_scores({7, 9, 2}, {{0.5}, {2}, {1024}, true}, spec);
  EXPECT_DOUBLE_EQ(scores[0], 0.5);  // var_0 = 0 and r_0 - mean_0 = 0
  EXPECT_DOUBLE_EQ(scores[1], 0.5 + 2 * 1 / std::sqrt(1 + 1e-5) + 1);
  EXPECT_DOUBLE_EQ(scores[2], 0.5 + 2 * -4 / std::sqrt(26.0 / 3 + 1e-5) + 2);
  const Values off = reference::normalise_scores({7, 9, 2}, {{0.5}, {2}, {1024}, false}, spec);
  EXPECT_ALL_EQUAL(off, (Values{14.5, 19.5, 6.5}));
}

TEST(Normalise, EqualsWelford) {
  for (const Spec& spec : {spec_of(2, 50), spec_of(1, 100, {0, 1, 33, 100})}) {
    const Values raw = test::normal(200, 61, 0.5, 30);
    Values expected(200);
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t head = 0; head < 2; ++head) {
        if (row >= spec.batch) continue;
        double count = 0, mean = 0, m2 = 0;
        for (int64_t t = 0; t < spec.seqlen; ++t) {
          for (int64_t start : spec.cu_seqlens) {
            if (start == t) count = mean = m2 = 0;
          }
          const int64_t at = (row * spec.seqlen + t) * 2 + head;
          const double delta = raw[at] - mean, position = count;
          count += 1;
          mean += delta / count;
          m2 += delta * (raw[at] - mean);
          expected[at] = kOptions.beta[head] + kOptions.gamma[head] * (raw[at] - mean) / std::sqrt(m2 / count + 1e-5) +
                         kOptions.slope[head] * position / 1024;
        }
      }
    }
    EXPECT_ELEMENTS_CLOSE(reference::normalise_scores(raw, kOptions, spec), expected, 1e-11);
  }
}

TEST(Normalise, GradientsAreDifferences) {
  const double step = 1e-5;
  for (bool timestep_norm : {true, false}) {
    for (const Spec& spec : {spec_of(2, 9), spec_of(1, 18, {0, 5, 6, 18})}) {
      NormaliseOptions options = kOptions;
      options.timestep_norm = timestep_norm;
      Values raw = test::normal(36, 62);
      const Values dscores = test::normal(36, 63);
      const NormaliseGradients grad = reference::normalise_scores_backward(raw, dscores, options, spec);
      const auto check = [&](Values& input, const Values& gradient, const char* what) {
        ASSERT_EQ(input.size(), gradient.size());
        for (size_t n = 0; n < input.size(); ++n) {
          const double before = input[n];
          double difference = 0;
          for (double sign : {1.0, -1.0}) {
            input[n] = before + sign * step;
            const Values scores = reference::normalise_scores(raw, options, spec);
            for (size_t t = 0; t < scores.size(); ++t) difference += sign * dscores[t] * scores[t] / (2 * step);
          }
          input[n] = before;
          EXPECT_NEAR(gradient[n], difference, 1e-7 * std::max(1.0, std::abs(difference))) << what << " " << n;
        }
      };
      check(raw, grad.draw, "draw");
      check(options.beta, grad.dbeta, "dbeta");
      check(options.gamma, grad.dgamma, "dgamma");
      check(options.slope, grad.dslope, "dslope");
    }
  }
}

}  // namespace
}  // namespace sparsek
