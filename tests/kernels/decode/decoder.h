// Feeds a random sequence token by token to decode_step from an empty, poisoned state, and compares everything the
// state and the outputs hold with the reference's whole-sequence results.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/decode/decode_step.h"
#include "kernels/cpu/simd/dispatch.h"
#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"
#include "tests/support/poison.h"

namespace sparsek::test {

struct Case {
  int32_t window_size = 8, num_sinks = 2, topk = 5, pool_size = 12;
  int64_t seqlen = 90;
  int32_t num_heads = 4, num_kv_heads = 2, head_dim = 16;
  bool far_rotary = false;
  Gate gate = Gate::kSoft;
  ScoreKind kind = ScoreKind::kNormal;
  int32_t batch = 1;
  int32_t lag = 0;  // batch row b is b * lag tokens ahead of row 0
  bool with_mass = true;
};

inline std::string describe(const Case& s, uint64_t seed) {
  return fmt::format(
      "w {} s {} k {} m {} T {} heads {}/{} head_dim {} far {} gate {} scores {} batch {} lag {} seed {}",
      s.window_size, s.num_sinks, s.topk, s.pool_size, s.seqlen, s.num_heads, s.num_kv_heads, s.head_dim, s.far_rotary,
      s.gate == Gate::kSoft ? "soft" : "hard", name(s.kind), s.batch, s.lag, seed);
}

// The whole sequence's inputs as doubles that Element can hold.
template <class Element>
struct Sequence {
  static constexpr bool kIsF64 = std::is_same_v<Element, double>;
  using Score = std::conditional_t<kIsF64, double, float>;

  Sequence(const Case& s, uint64_t seed) : setup(s) {
    const int64_t tokens = s.batch * s.seqlen;
    const int64_t q_count = tokens * s.num_heads * s.head_dim, k_count = tokens * s.num_kv_heads * s.head_dim;
    inputs.q = stored(normal(q_count, seed, 1.5));
    inputs.k = stored(normal(k_count, seed + 1));
    inputs.v = stored(normal(k_count, seed + 2, 1.0, 0.1));
    inputs.scores = make_scores(s.kind, s.batch, s.seqlen, s.num_kv_heads, seed + 3);
    if (s.far_rotary) {
      inputs.q_far = stored(normal(q_count, seed + 4, 1.5));
      inputs.k_far = stored(normal(k_count, seed + 5));
    }
    spec.batch = s.batch;
    spec.seqlen = s.seqlen;
    spec.num_heads = s.num_heads;
    spec.num_kv_heads = s.num_kv_heads;
    spec.head_dim = s.head_dim;
    spec.topk = s.topk;
    spec.window_size = s.window_size;
    spec.num_sinks = s.num_sinks;
    spec.pool_size = s.pool_size;
    spec.gate = s.gate;
    spec.softmax_scale = softmax_scale();
    spec.precision = kIsF64 ? reference::Precision::kFloat64 : reference::Precision::kFloat32;
  }
  static Values stored(Values values) {
    if constexpr (kIsF64) return values;
    return std::is_same_v<Element, float> ? round_to_f32(values) : round_to_bf16(values);
  }
  double softmax_scale() const { return 1.3 / std::sqrt(static_cast<double>(setup.head_dim)); }

  Case setup;
  reference::AttentionInputs inputs;
  reference::Spec spec;
};

// The state of section 6, poisoned where nothing has been written, and one step for a range of its batch rows.
template <class Element>
class Decoder {
 public:
  using Score = typename Sequence<Element>::Score;

  explicit Decoder(const Sequence<Element>& sequence)
      : setup(sequence.setup),
        softmax_scale(sequence.softmax_scale()),
        q(to_storage<Element>(sequence.inputs.q)),
        k(to_storage<Element>(sequence.inputs.k)),
        v(to_storage<Element>(sequence.inputs.v)),
        q_far(to_storage<Element>(sequence.inputs.q_far)),
        k_far(to_storage<Element>(sequence.inputs.k_far)),
        scores(to_storage<Score>(sequence.inputs.scores)),
        state_k(units() * state_rows() * setup.head_dim),
        state_v(units() * state_rows() * setup.head_dim),
        ring_k(setup.far_rotary ? units() * setup.window_size * setup.head_dim : 0),
        slot_scores(units() * setup.topk),
        pool_scores(units() * setup.pool_size, -std::numeric_limits<Score>::infinity()),
        ring_mass(units() * setup.window_size),
        slot_positions(units() * setup.topk, -1),
        lengths(setup.batch, 0),
        out(int64_t{setup.batch} * setup.num_heads * setup.head_dim),
        softmax_lse(int64_t{setup.batch} * setup.num_heads) {}

  int64_t units() const { return int64_t{setup.batch} * setup.num_kv_heads; }
  int64_t state_rows() const { return int64_t{setup.num_sinks} + setup.window_size + setup.topk; }

  // The candidate scores of the step at the lengths as they are; NaN where none may be read.
  std::vector<Score> candidates(int32_t first_row, int32_t num_rows) const {
    std::vector<Score> result;
    for (int32_t b = first_row; b < first_row + num_rows; ++b) {
      const int64_t position = lengths[b] - setup.window_size;
      for (int32_t h = 0; h < setup.num_kv_heads; ++h) {
        result.push_back(position < setup.num_sinks ? std::numeric_limits<Score>::quiet_NaN()
                                                    : scores[(b * setup.seqlen + position) * setup.num_kv_heads + h]);
      }
    }
    return result;
  }

  void step(int32_t first_row, int32_t num_rows) { step(first_row, num_rows, candidates(first_row, num_rows)); }
  void step(int32_t first_row, int32_t num_rows, const std::vector<Score>& candidate_scores) {
    const int64_t unit = int64_t{first_row} * setup.num_kv_heads, d = setup.head_dim;
    const int64_t token = first_row * setup.seqlen + lengths[first_row];
    const int64_t batch_step = setup.seqlen + (num_rows > 1 ? lengths[first_row + 1] - lengths[first_row] : 0);
    const int64_t q_token = setup.num_heads * d, k_token = setup.num_kv_heads * d;
    DecodeStepParams p{};
    p.dtype = std::is_same_v<Element, double>  ? DType::kF64
              : std::is_same_v<Element, float> ? DType::kF32
                                               : DType::kBF16;
    p.q = q.data() + token * q_token;
    p.k = k.data() + token * k_token;
    p.v = v.data() + token * k_token;
    p.candidate_scores = candidate_scores.data();
    p.state_k = state_k.data() + unit * state_rows() * d;
    p.state_v = state_v.data() + unit * state_rows() * d;
    if (setup.far_rotary) {
      p.q_far = q_far.data() + token * q_token;
      p.k_far = k_far.data() + token * k_token;
      p.ring_k = ring_k.data() + unit * setup.window_size * d;
    }
    p.slot_scores = slot_scores.data() + unit * setup.topk;
    p.slot_positions = slot_positions.data() + unit * setup.topk;
    p.pool_scores = pool_scores.data() + unit * setup.pool_size;
    p.ring_mass = setup.with_mass ? ring_mass.data() + unit * setup.window_size : nullptr;
    p.lengths = lengths.data() + first_row;
    p.out = out.data() + first_row * q_token;
    p.softmax_lse = softmax_lse.data() + int64_t{first_row} * setup.num_heads;
    p.q_stride_batch = p.q_far_stride_batch = batch_step * q_token;
    p.k_stride_batch = p.k_far_stride_batch = p.v_stride_batch = batch_step * k_token;
    p.q_stride_head = p.q_far_stride_head = p.k_stride_head = p.k_far_stride_head = p.v_stride_head = d;
    p.batch = num_rows;
    p.num_heads = setup.num_heads;
    p.num_kv_heads = setup.num_kv_heads;
    p.head_dim = setup.head_dim;
    p.topk = setup.topk;
    p.window_size = setup.window_size;
    p.num_sinks = setup.num_sinks;
    p.pool_size = setup.pool_size;
    p.gate = setup.gate;
    p.softmax_scale = softmax_scale;
    cpu::decode_step(p);
  }

  bool guards_intact() const {
    return state_k.guards_intact() && state_v.guards_intact() && ring_k.guards_intact() &&
           slot_scores.guards_intact() && pool_scores.guards_intact() && ring_mass.guards_intact() &&
           slot_positions.guards_intact() && lengths.guards_intact() && out.guards_intact() &&
           softmax_lse.guards_intact();
  }

  Case setup;
  double softmax_scale;
  std::vector<Element> q, k, v, q_far, k_far;
  std::vector<Score> scores;
  Poisoned<Element> state_k, state_v, ring_k;
  Poisoned<Score> slot_scores, pool_scores, ring_mass;
  Poisoned<int64_t> slot_positions, lengths;
  Poisoned<Element> out;
  Poisoned<Score> softmax_lse;
};

// What the reference says about every position.
struct Expected {
  struct Query {
    std::vector<int64_t> selected;  // ascending
    Values pool;                    // scores, descending
  };
  template <class Element>
  explicit Expected(const Sequence<Element>& sequence)
      : attention(reference::attention_forward(sequence.inputs, sequence.spec)),
        mass(reference::window_mass(sequence.inputs, sequence.spec).mass) {
    const reference::Spec& spec = sequence.spec;
    for (int64_t b = 0; b < spec.batch; ++b) {
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        Values u;
        for (int64_t t = 0; t < spec.seqlen; ++t) {
          u.push_back(sequence.inputs.scores[(b * spec.seqlen + t) * spec.num_kv_heads + h]);
        }
        std::vector<Query>& at = queries.emplace_back();
        reference::for_each_query(u, spec, [&](const reference::QuerySelection& selection) {
          Query query;
          query.selected.assign(selection.pool.begin(), selection.pool.begin() + selection.num_selected);
          std::sort(query.selected.begin(), query.selected.end());
          for (const int64_t j : selection.pool) query.pool.push_back(u[j]);
          at.push_back(query);
        });
      }
    }
  }
  reference::AttentionOutputs attention;
  Values mass;
  std::vector<std::vector<Query>> queries;  // [batch * num_kv_heads][seqlen]
};

template <class Element>
struct Tolerance {
  static constexpr bool kIsBf16 = std::is_same_v<Element, BFloat16>, kIsF64 = std::is_same_v<Element, double>;
  static constexpr double kOut = kIsF64 ? 1e-12 : 1e-5;
  static constexpr double kLse = kIsF64 ? 1e-12 : 5e-6;
  static constexpr double kMass = kIsF64 ? 1e-12 : 2e-5;
};

// One row of out. bfloat16: each element is the rounding of some value within the float32 tolerance.
template <class Element>
::testing::AssertionResult out_row_close(const Element* got, const Values& wanted) {
  const auto d = static_cast<int64_t>(wanted.size());
  const Values values = as_doubles(std::span(got, wanted.size()));
  if constexpr (!Tolerance<Element>::kIsBf16) return rows_close(values, wanted, d, Tolerance<Element>::kOut);
  const double slack = Tolerance<Element>::kOut * row_error(wanted.data(), wanted.data(), d).norm;
  for (int64_t c = 0; c < d; ++c) {
    const double low = to_float(to_bf16(static_cast<float>(wanted[c] - slack)));
    const double high = to_float(to_bf16(static_cast<float>(wanted[c] + slack)));
    if (!(low <= values[c] && values[c] <= high)) {
      return ::testing::AssertionFailure() << "channel " << c << ": got " << values[c] << ", want " << wanted[c];
    }
  }
  return ::testing::AssertionSuccess();
}

// Outputs and state of batch row b, just after the step at `position`.
template <class Element>
void expect_state(const Decoder<Element>& decoder, const Sequence<Element>& sequence, const Expected& expected,
                  int32_t b, int64_t position) {
  const Case& s = decoder.setup;
  const int64_t d = s.head_dim;
  ASSERT_EQ(decoder.lengths[b], position + 1);
  for (int64_t head = 0; head < s.num_heads; ++head) {
    const int64_t row = b * s.num_heads + head;
    const double* wanted = &expected.attention.out[((b * s.seqlen + position) * s.num_heads + head) * d];
    ASSERT_TRUE(out_row_close(&decoder.out[row * d], Values(wanted, wanted + d)))
        << "out, head " << head << " at " << position;
    const double lse = expected.attention.softmax_lse[row * s.seqlen + position];
    ASSERT_TRUE(std::abs(decoder.softmax_lse[row] - lse) <= Tolerance<Element>::kLse * std::max(1.0, std::abs(lse)))
        << "softmax_lse " << decoder.softmax_lse[row] << ", want " << lse << ", head " << head << " at " << position;
  }
  for (int64_t h = 0; h < s.num_kv_heads; ++h) {
    const int64_t unit = b * s.num_kv_heads + h;
    const Expected::Query& query = expected.queries[unit][position];
    std::vector<int64_t> selected;
    for (int32_t slot = 0; slot < s.topk; ++slot) {
      const int64_t j = decoder.slot_positions[unit * s.topk + slot];
      if (j < 0) {
        ASSERT_EQ(j, -1);
        continue;
      }
      selected.push_back(j);
      ASSERT_EQ(decoder.slot_scores[unit * s.topk + slot],
                sequence.inputs.scores[(b * s.seqlen + j) * s.num_kv_heads + h]);
      const int64_t row = (unit * decoder.state_rows() + s.num_sinks + s.window_size + slot) * d;
      const int64_t from = ((b * s.seqlen + j) * s.num_kv_heads + h) * d;
      const auto& keys = s.far_rotary ? decoder.k_far : decoder.k;
      ASSERT_EQ(std::memcmp(&decoder.state_k[row], &keys[from], d * sizeof(Element)), 0) << "slot " << slot;
      ASSERT_EQ(std::memcmp(&decoder.state_v[row], &decoder.v[from], d * sizeof(Element)), 0) << "slot " << slot;
    }
    std::sort(selected.begin(), selected.end());
    ASSERT_EQ(selected, query.selected) << "unit " << unit << " at " << position;
    for (int64_t r = 0; r < s.pool_size; ++r) {
      const double wanted = r < static_cast<int64_t>(query.pool.size()) ? query.pool[r] : -INFINITY;
      ASSERT_EQ(decoder.pool_scores[unit * s.pool_size + r], wanted) << "pool rank " << r << " at " << position;
    }
    // The key that leaves next has been seen by every query that counts.
    const int64_t leaving = position + 1 - s.window_size;
    if (s.with_mass && leaving >= 0) {
      const double wanted = expected.mass[(b * s.seqlen + leaving) * s.num_kv_heads + h];
      const double got = decoder.ring_mass[unit * s.window_size + leaving % s.window_size];
      ASSERT_TRUE(std::abs(got - wanted) <= Tolerance<Element>::kMass * wanted + 1e-12)
          << "mass " << got << ", want " << wanted << ", key " << leaving;
    }
  }
}

// The whole sequence; batch rows ahead of row 0 take their first tokens alone.
template <class Element>
void check_sequence(const Case& setup, uint64_t seed) {
  SCOPED_TRACE(describe(setup, seed));
  const Sequence<Element> sequence(setup, seed);
  const Expected expected(sequence);
  Decoder<Element> decoder(sequence);
  for (int32_t b = 0; b < setup.batch; ++b) {
    for (int64_t t = 0; t < b * setup.lag; ++t) {
      decoder.step(b, 1);
      ASSERT_NO_FATAL_FAILURE(expect_state(decoder, sequence, expected, b, t));
    }
  }
  for (int64_t t = 0; t + (setup.batch - 1) * setup.lag < setup.seqlen; ++t) {
    decoder.step(0, setup.batch);
    for (int32_t b = 0; b < setup.batch; ++b) {
      ASSERT_NO_FATAL_FAILURE(expect_state(decoder, sequence, expected, b, t + b * setup.lag));
    }
  }
  EXPECT_TRUE(decoder.guards_intact());
}

}  // namespace sparsek::test
