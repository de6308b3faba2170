// The reference's attention against a transcription of eq. 7-9 as T x T matrices, and its gradients against central
// differences.
#include <cmath>

#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek {
namespace {

using reference::AttentionGradients;
using reference::AttentionInputs;
using reference::AttentionOutputs;
using reference::Precision;
using reference::Spec;
using reference::Values;
using test::ScoreKind;

struct Case {
  const char* what;
  Spec spec;
  bool far_rotary;
  double scores_std;
};

std::vector<Case> cases() {
  const Spec plain{.batch = 2,
                   .seqlen = 37,
                   .num_heads = 4,
                   .num_kv_heads = 2,
                   .head_dim = 8,
                   .topk = 5,
                   .window_size = 4,
                   .num_sinks = 2,
                   .softmax_scale = 0.4,
                   .precision = Precision::kFloat64};
  std::vector<Case> all = {{"plain", plain, false, 0.5}, {"far", plain, true, 0.5}, {"pool", plain, true, 0.2}};
  all[2].spec.pool_size = 8;
  all.push_back({"window of 1, no sinks", plain, true, 1.0});
  all.back().spec.window_size = 1;
  all.back().spec.num_sinks = 0;
  all.push_back({"packed", plain, true, 0.5});
  all.back().spec.batch = 1;
  all.back().spec.cu_seqlens = {0, 3, 4, 24, 37};
  all.push_back({"sinks beyond the window", plain, true, 0.5});
  all.back().spec.num_sinks = 9;
  all.push_back({"one head", plain, false, 3.0});
  all.back().spec.num_heads = all.back().spec.num_kv_heads = 1;
  const size_t num_soft = all.size();
  for (size_t n = 0; n < num_soft; ++n) {
    all.push_back(all[n]);
    all.back().spec.gate = Gate::kHard;
  }
  return all;
}

AttentionInputs make_inputs(const Case& c, uint64_t seed) {
  const Spec& s = c.spec;
  const int64_t q_size = s.batch * s.seqlen * s.num_heads * s.head_dim;
  const int64_t kv_size = s.batch * s.seqlen * s.num_kv_heads * s.head_dim;
  AttentionInputs inputs{test::normal(q_size, seed + 1), test::normal(kv_size, seed + 2),
                         test::normal(kv_size, seed + 3),
                         test::normal(s.batch * s.seqlen * s.num_kv_heads, seed + 4, c.scores_std)};
  if (c.far_rotary) {
    inputs.q_far = test::normal(q_size, seed + 5);
    inputs.k_far = test::normal(kv_size, seed + 6);
  }
  return inputs;
}

int64_t document_begin(const Spec& s, int64_t i) {
  int64_t begin = 0;
  for (int64_t start : s.cu_seqlens) {
    if (start <= i) begin = start;
  }
  return begin;
}

// How often key j is outranked among the candidates of query i.
int64_t outranked(const Values& u, const Spec& s, int64_t i, int64_t j) {
  int64_t count = 0;
  for (int64_t other = document_begin(s, i) + s.num_sinks; other <= i - s.window_size; ++other) {
    if (u[other] > u[j] || (u[other] == u[j] && other < j)) ++count;
  }
  return count;
}

double bisected_tau(Values z, int64_t k) {
  double low = -1e3, high = 1e3;
  for (int step = 0; step < 200; ++step) {
    const double middle = (low + high) / 2;
    double sum = 0;
    for (double x : z) sum += std::min(1.0, std::max(0.0, x - middle));
    (sum >= static_cast<double>(k) ? low : high) = middle;
  }
  return low;
}

// eq. 3-9 with one T x T matrix each of visibility, gates and logits.
AttentionOutputs transcription(const AttentionInputs& in, const Spec& s) {
  const int64_t T = s.seqlen, D = s.head_dim, group = s.num_heads / s.num_kv_heads;
  AttentionOutputs result{Values(in.q.size(), 0.0), Values(s.batch * s.num_heads * T)};
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t head = 0; head < s.num_heads; ++head) {
      const int64_t kv_head = head / group;
      Values u(T), gate(T * T, 0.0), unnormalised(T * T, 0.0);
      for (int64_t t = 0; t < T; ++t) u[t] = in.scores[(b * T + t) * s.num_kv_heads + kv_head];
      for (int64_t i = 0; i < T; ++i) {
        const int64_t begin = document_begin(s, i);
        Values pool;
        for (int64_t j = begin + s.num_sinks; j <= i - s.window_size; ++j) {
          if (s.pool_size == 0 || outranked(u, s, i, j) < s.pool_size) pool.push_back(u[j]);
        }
        const bool every_weight_is_1 = static_cast<int64_t>(pool.size()) <= s.topk;
        const double tau = every_weight_is_1 ? 0 : bisected_tau(pool, s.topk);
        for (int64_t j = begin; j <= i; ++j) {
          const bool in_window = j > i - s.window_size, is_sink = j < begin + s.num_sinks;
          if (!in_window && !is_sink && outranked(u, s, i, j) >= s.topk) continue;
          const bool is_gated = !in_window && !is_sink && s.gate == Gate::kSoft && !every_weight_is_1;
          gate[i * T + j] = is_gated ? std::min(1.0, std::max(0.0, u[j] - tau)) : 1.0;
          const bool far = !in_window && !in.q_far.empty();
          double logit = 0;
          for (int64_t d = 0; d < D; ++d) {
            logit += (far ? in.q_far : in.q)[((b * T + i) * s.num_heads + head) * D + d] *
                     (far ? in.k_far : in.k)[((b * T + j) * s.num_kv_heads + kv_head) * D + d];
          }
          unnormalised[i * T + j] = std::exp(s.softmax_scale * logit);
        }
      }
      for (int64_t i = 0; i < T; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < T; ++j) sum += unnormalised[i * T + j];
        result.softmax_lse[(b * s.num_heads + head) * T + i] = std::log(sum);
        for (int64_t j = 0; j < T; ++j) {
          for (int64_t d = 0; d < D; ++d) {
            result.out[((b * T + i) * s.num_heads + head) * D + d] +=
                unnormalised[i * T + j] / sum * gate[i * T + j] *
                in.v[((b * T + j) * s.num_kv_heads + kv_head) * D + d];
          }
        }
      }
    }
  }
  return result;
}

TEST(Attention, ForwardEqualsTheTranscription) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(fmt::format("{} gate {}", c.what, static_cast<int>(c.spec.gate)));
    AttentionInputs inputs = make_inputs(c, 20);
    const AttentionOutputs actual = reference::attention_forward(inputs, c.spec);
    const AttentionOutputs expected = transcription(inputs, c.spec);
    EXPECT_ROWS_CLOSE(actual.out, expected.out, c.spec.head_dim, 1e-12);
    EXPECT_ELEMENTS_CLOSE(actual.softmax_lse, expected.softmax_lse, 1e-12);
  }
}

TEST(Attention, LargeLogitsDoNotOverflow) {
  Case c = cases()[0];
  AttentionInputs inputs = make_inputs(c, 21);
  for (double& x : inputs.q) x *= 1e4;
  const AttentionOutputs outputs = reference::attention_forward(inputs, c.spec);
  for (double x : outputs.out) ASSERT_TRUE(std::isfinite(x));
  for (double x : outputs.softmax_lse) ASSERT_TRUE(std::isfinite(x));
}

TEST(Attention, LargeBudgetIsDense) {
  Case c = cases()[0];
  c.spec.topk = c.spec.seqlen;
  const AttentionInputs inputs = make_inputs(c, 22);
  const AttentionOutputs actual = reference::attention_forward(inputs, c.spec);
  c.spec.window_size = c.spec.seqlen;
  c.spec.num_sinks = 0;
  EXPECT_ROWS_CLOSE(actual.out, transcription(inputs, c.spec).out, c.spec.head_dim, 1e-12);
}

TEST(Attention, FutureTokensChangeNothing) {
  for (const Case& c : cases()) {
    if (c.spec.batch != 2) continue;
    AttentionInputs inputs = make_inputs(c, 23);
    const AttentionOutputs before = reference::attention_forward(inputs, c.spec);
    const int64_t changed = 30, T = c.spec.seqlen;  // in the second batch row
    const auto damage = [&](Values& values, int64_t heads) {
      const int64_t row = heads * static_cast<int64_t>(values.size()) / (2 * T * heads);
      for (int64_t n = (T + changed) * row; n < 2 * T * row; ++n) values[n] = 50 - values[n];
    };
    for (Values* values : {&inputs.q, &inputs.k, &inputs.v, &inputs.scores, &inputs.q_far, &inputs.k_far}) {
      if (!values->empty()) damage(*values, 1);
    }
    const AttentionOutputs after = reference::attention_forward(inputs, c.spec);
    const int64_t unchanged = (T + changed) * c.spec.num_heads * c.spec.head_dim;
    EXPECT_ALL_EQUAL((Values{after.out.begin(), after.out.begin() + unchanged}),
                     (Values{before.out.begin(), before.out.begin() + unchanged}));
    EXPECT_NE(after.out[unchanged], before.out[unchanged]);
  }
}

// <dout, out> + <dlse, lse>: its differences are what attention_backward must return.
double loss(const AttentionInputs& inputs, const Spec& spec, const Values& dout, const Values& dlse) {
  const AttentionOutputs outputs = reference::attention_forward(inputs, spec);
  double sum = 0;
  for (size_t n = 0; n < dout.size(); ++n) sum += dout[n] * outputs.out[n];
  for (size_t n = 0; n < dlse.size(); ++n) sum += dlse[n] * outputs.softmax_lse[n];
  return sum;
}

// The smallest distance of any score to a kink of eq. 2 or to a selection change; differences are valid well below it.
double distance_to_kinks(const AttentionInputs& inputs, const Spec& s) {
  double distance = 1;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t head = 0; head < s.num_kv_heads; ++head) {
      Values u(s.seqlen);
      for (int64_t t = 0; t < s.seqlen; ++t) u[t] = inputs.scores[(b * s.seqlen + t) * s.num_kv_heads + head];
      for (int64_t a = 0; a < s.seqlen; ++a) {
        for (int64_t other = 0; other < a; ++other) distance = std::min(distance, std::abs(u[a] - u[other]));
      }
      reference::for_each_query(u, s, [&](const reference::QuerySelection& selection) {
        if (!std::isfinite(selection.tau)) return;
        // Where F is empty, tau follows the k-th score, which is a kink only for the other scores.
        const double kth = u[selection.pool[selection.num_selected - 1]];
        for (int64_t j : selection.pool) {
          if (u[j] == kth && std::abs(u[j] - selection.tau - 1) < 1e-12) continue;
          distance = std::min({distance, std::abs(u[j] - selection.tau), std::abs(u[j] - selection.tau - 1)});
        }
      });
    }
  }
  return distance;
}

constexpr double kStep = 1e-6;

AttentionInputs inputs_away_from_kinks(const Case& c) {
  for (uint64_t seed = 100; seed < 400; ++seed) {
    AttentionInputs inputs = make_inputs(c, seed * 10);
    if (distance_to_kinks(inputs, c.spec) > 4 * kStep) return inputs;
  }
  ADD_FAILURE() << c.what << ": no seed is away from kinks";
  return make_inputs(c, 1);
}

TEST(Attention, GradientsAreDifferences) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(fmt::format("{} gate {}", c.what, static_cast<int>(c.spec.gate)));
    AttentionInputs inputs = inputs_away_from_kinks(c);
    const Values dout = test::normal(inputs.q.size(), 31);
    const Values dlse = test::normal(c.spec.batch * c.spec.num_heads * c.spec.seqlen, 32);
    const AttentionGradients grad = reference::attention_backward(inputs, dout, dlse, c.spec);
    const auto check = [&](Values& input, const Values& gradient, const char* what) {
      ASSERT_EQ(gradient.size(), input.size()) << what;
      const size_t stride = (input.size() / 50) | 1;  // odd: every position of an even head_dim is met
      for (size_t n = 0; n < input.size(); n += stride) {
        const double before = input[n];
        input[n] = before + kStep;
        const double up = loss(inputs, c.spec, dout, dlse);
        input[n] = before - kStep;
        const double down = loss(inputs, c.spec, dout, dlse);
        input[n] = before;
        EXPECT_NEAR(gradient[n], (up - down) / (2 * kStep), 1e-7 * std::max(1.0, std::abs(gradient[n])))
            << what << " " << n;
      }
    };
    check(inputs.q, grad.dq, "dq");
    check(inputs.k, grad.dk, "dk");
    check(inputs.v, grad.dv, "dv");
    check(inputs.q_far, grad.dq_far, "dq_far");
    check(inputs.k_far, grad.dk_far, "dk_far");
    if (c.spec.gate == Gate::kSoft) check(inputs.scores, grad.dscores, "dscores");
  }
}

// Hard gates: dscores is the gradient of sum_ij h_ij p_ij(u) with h frozen (straight-through), and h does not depend on
// the gate, so it equals the soft gate's.
TEST(Attention, HardGateIsStraightThrough) {
  for (const Case& c : cases()) {
    if (c.spec.gate != Gate::kHard) continue;
    SCOPED_TRACE(c.what);
    const AttentionInputs inputs = inputs_away_from_kinks(c);
    const Spec& s = c.spec;
    const int64_t T = s.seqlen, D = s.head_dim, group = s.num_heads / s.num_kv_heads;
    const Values dout = test::normal(inputs.q.size(), 33);
    const AttentionGradients grad = reference::attention_backward(inputs, dout, {}, s);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t kv_head = 0; kv_head < s.num_kv_heads; ++kv_head) {
        // h from lse: a_ij = exp(logit - lse), far logits because selected keys are outside the window.
        const AttentionOutputs outputs = reference::attention_forward(inputs, s);
        const auto h = [&](int64_t i, int64_t j) {
          double sum = 0;
          for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            double logit = 0, dout_dot_v = 0;
            for (int64_t d = 0; d < D; ++d) {
              const int64_t q_at = ((b * T + i) * s.num_heads + head) * D + d;
              const int64_t k_at = ((b * T + j) * s.num_kv_heads + kv_head) * D + d;
              logit += (c.far_rotary ? inputs.q_far : inputs.q)[q_at] * (c.far_rotary ? inputs.k_far : inputs.k)[k_at];
              dout_dot_v += dout[q_at] * inputs.v[k_at];
            }
            sum +=
                std::exp(s.softmax_scale * logit - outputs.softmax_lse[(b * s.num_heads + head) * T + i]) * dout_dot_v;
          }
          return sum;
        };
        Values u(T), frozen(T * T, 0.0);
        for (int64_t t = 0; t < T; ++t) u[t] = inputs.scores[(b * T + t) * s.num_kv_heads + kv_head];
        reference::for_each_query(u, s, [&](const reference::QuerySelection& selection) {
          for (int64_t rank = 0; rank < selection.num_selected; ++rank) {
            frozen[selection.query * T + selection.pool[rank]] = h(selection.query, selection.pool[rank]);
          }
        });
        const auto surrogate = [&] {
          double sum = 0;
          reference::for_each_query(u, s, [&](const reference::QuerySelection& selection) {
            for (size_t rank = 0; rank < selection.pool.size(); ++rank) {
              sum += frozen[selection.query * T + selection.pool[rank]] * selection.weights[rank];
            }
          });
          return sum;
        };
        for (int64_t j = 0; j < T; ++j) {
          const double before = u[j];
          u[j] = before + kStep;
          const double up = surrogate();
          u[j] = before - kStep;
          const double down = surrogate();
          u[j] = before;
          EXPECT_NEAR(grad.dscores[(b * T + j) * s.num_kv_heads + kv_head], (up - down) / (2 * kStep), 1e-7)
              << "key " << j;
        }
      }
    }
  }
}

TEST(Attention, ScoreGradientSumsToZeroInEveryDocument) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.what);
    const AttentionInputs inputs = make_inputs(c, 40);
    const AttentionGradients grad =
        reference::attention_backward(inputs, test::normal(inputs.q.size(), 41), {}, c.spec);
    for (int64_t b = 0; b < c.spec.batch; ++b) {
      for (int64_t head = 0; head < c.spec.num_kv_heads; ++head) {
        for (const reference::Document& document : reference::documents(c.spec)) {
          double sum = 0;
          for (int64_t t = document.begin; t < document.end; ++t) {
            sum += grad.dscores[(b * c.spec.seqlen + t) * c.spec.num_kv_heads + head];
          }
          EXPECT_NEAR(sum, 0, 1e-12);
        }
      }
    }
    EXPECT_TRUE(std::any_of(grad.dscores.begin(), grad.dscores.end(), [](double x) { return std::abs(x) > 1e-3; }));
  }
}

TEST(WindowMass, EqualsTheTranscription) {
  for (Case c : cases()) {
    for (int64_t w : {int64_t{1}, int64_t{4}, int64_t{5}}) {
      c.spec.window_size = w;
      SCOPED_TRACE(fmt::format("{} window {}", c.what, w));
      const Spec& s = c.spec;
      const int64_t T = s.seqlen, D = s.head_dim, group = s.num_heads / s.num_kv_heads;
      const AttentionInputs inputs = make_inputs(c, 50);
      const reference::WindowMass actual = reference::window_mass(inputs, s);
      Values mass(actual.mass.size(), 0.0), y(actual.y.size());
      // lse^W: a selection of nothing, so eq. 8 over window and sinks alone.
      for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t head = 0; head < s.num_heads; ++head) {
          for (int64_t i = 0; i < T; ++i) {
            const int64_t begin = document_begin(s, i);
            Values weight(T, 0.0);
            double sum = 0;
            for (int64_t j = begin; j <= i; ++j) {
              const bool in_window = j > i - w;
              if (!in_window && j >= begin + s.num_sinks) continue;
              const bool far = !in_window && c.far_rotary;
              double logit = 0;
              for (int64_t d = 0; d < D; ++d) {
                logit += (far ? inputs.q_far : inputs.q)[((b * T + i) * s.num_heads + head) * D + d] *
                         (far ? inputs.k_far : inputs.k)[((b * T + j) * s.num_kv_heads + head / group) * D + d];
              }
              sum += weight[j] = std::exp(s.softmax_scale * logit);
            }
            for (int64_t j = begin; j <= i; ++j) {
              if (j + (w + 1) / 2 <= i && i <= j + w - 1)
                mass[(b * T + j) * s.num_kv_heads + head / group] += weight[j] / sum;
            }
          }
        }
        for (int64_t j = 0; j < T; ++j) {
          int64_t end = T;
          for (int64_t start : s.cu_seqlens) {
            if (start > j) end = std::min(end, start);
          }
          const int64_t count = std::min(j + w, end) - (j + (w + 1) / 2);
          for (int64_t head = 0; head < s.num_kv_heads; ++head) {
            const int64_t at = (b * T + j) * s.num_kv_heads + head;
            y[at] = std::log(1e-9 + (count > 0 ? mass[at] / static_cast<double>(count) : 0));
          }
        }
      }
      EXPECT_ELEMENTS_CLOSE(actual.mass, mass, 1e-12);
      EXPECT_ELEMENTS_CLOSE(actual.y, y, 1e-12);
    }
  }
}

}  // namespace
}  // namespace sparsek
