// select_chunk over random chunkings against select of the whole sequence (eq. 12), which select_test.cc checks.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "base/error.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::Spec;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The carried state of one (batch row, KV head) and where the pool's entries came from, which the kernel never sees.
template <class T>
struct LaneState {
  std::vector<T> slot_scores, pool_scores;
  std::vector<int64_t> slot_positions, pool_positions;
};

// A whole sequence [seqlen, num_kv_heads] and its state after `length` tokens.
template <class T>
struct Sequence {
  std::vector<T> scores;
  SelectResult<T> whole;
  std::vector<LaneState<T>> lanes;
  int64_t length = 0;
};

template <class T>
class ChunkTest {
 public:
  ChunkTest(const Spec& spec, uint64_t seed) : spec_(spec), engine_(seed) {}

  Sequence<T> start(const Values& values) const {
    Sequence<T> sequence;
    sequence.scores.assign(values.begin(), values.end());
    sequence.whole = run_select(sequence.scores, spec_);
    for (int64_t h = 0; h < spec_.num_kv_heads; ++h) {
      const int64_t capacity = spec_.pool_size;  // an unlimited pool starts empty
      sequence.lanes.push_back({std::vector<T>(spec_.topk, std::numeric_limits<T>::quiet_NaN()),
                                std::vector<T>(capacity, kMinusInfinity), std::vector<int64_t>(spec_.topk, -1),
                                std::vector<int64_t>(capacity, -1)});
    }
    return sequence;
  }

  // Runs one chunk for all `sequences` in one call, checks every output and moves the states on.
  void advance(const std::vector<Sequence<T>*>& sequences, int64_t chunk) {
    const int64_t batch = std::ssize(sequences), heads = spec_.num_kv_heads, topk = spec_.topk;
    const int64_t capacity = std::ssize(sequences[0]->lanes[0].pool_scores);
    const int64_t new_capacity = spec_.pool_size > 0 ? spec_.pool_size : capacity + chunk;
    std::vector<T> candidate_scores(batch * chunk * heads, std::numeric_limits<T>::quiet_NaN()), slot_scores,
        pool_scores;
    std::vector<int64_t> slot_positions, lengths;
    for (int64_t b = 0; b < batch; ++b) {
      const Sequence<T>& sequence = *sequences[b];
      lengths.push_back(sequence.length);
      for (int64_t t = 0; t < chunk; ++t) {
        const int64_t key = sequence.length + t - spec_.window_size;
        if (key < spec_.num_sinks) continue;
        for (int64_t h = 0; h < heads; ++h) {
          candidate_scores[(b * chunk + t) * heads + h] = sequence.scores[key * heads + h];
        }
      }
      for (const LaneState<T>& lane : sequence.lanes) {
        slot_scores.insert(slot_scores.end(), lane.slot_scores.begin(), lane.slot_scores.end());
        slot_positions.insert(slot_positions.end(), lane.slot_positions.begin(), lane.slot_positions.end());
        pool_scores.insert(pool_scores.end(), lane.pool_scores.begin(), lane.pool_scores.end());
      }
    }
    const int64_t lanes = batch * heads;
    Poisoned<T> tau(lanes * chunk);
    Poisoned<int32_t> slot_expiry(lanes * topk), slot_begin(lanes * topk), slot_end(lanes * topk);
    Poisoned<int32_t> pool_begin(lanes * capacity), pool_end(lanes * capacity);
    Poisoned<int32_t> arrival_expiry(lanes * chunk), arrival_begin(lanes * chunk), arrival_end(lanes * chunk);
    Poisoned<int32_t> slot_source(lanes * topk), pool_source(lanes * new_capacity);
    Poisoned<int64_t> new_positions(lanes * topk);
    SelectChunkParams params{};
    params.dtype = kDType<T>;
    params.candidate_scores = candidate_scores.data();
    params.slot_scores = slot_scores.data();
    params.slot_positions = slot_positions.data();
    params.pool_scores = pool_scores.data();
    params.lengths = lengths.data();
    params.tau = tau.data();
    params.slot_expiry = slot_expiry.data();
    params.slot_frac_begin = slot_begin.data();
    params.slot_frac_end = slot_end.data();
    params.pool_frac_begin = pool_begin.data();
    params.pool_frac_end = pool_end.data();
    params.arrival_expiry = arrival_expiry.data();
    params.arrival_frac_begin = arrival_begin.data();
    params.arrival_frac_end = arrival_end.data();
    params.new_slot_source = slot_source.data();
    params.new_slot_positions = new_positions.data();
    params.new_pool_source = pool_source.data();
    params.scores_strides = params.tau_strides = contiguous(chunk, heads);
    params.batch = static_cast<int32_t>(batch);
    params.chunk = static_cast<int32_t>(chunk);
    params.num_kv_heads = static_cast<int32_t>(heads);
    params.topk = static_cast<int32_t>(topk);
    params.window_size = static_cast<int32_t>(spec_.window_size);
    params.num_sinks = static_cast<int32_t>(spec_.num_sinks);
    params.pool_size = static_cast<int32_t>(spec_.pool_size);
    params.pool_capacity = static_cast<int32_t>(capacity);
    params.new_pool_capacity = static_cast<int32_t>(new_capacity);
    cpu::select_chunk(params);
    for (const auto* buffer : {&slot_expiry, &slot_begin, &slot_end, &pool_begin, &pool_end, &arrival_expiry,
                               &arrival_begin, &arrival_end, &slot_source, &pool_source}) {
      EXPECT_FULLY_WRITTEN(*buffer);
      EXPECT_GUARDS_INTACT(*buffer);
    }
    EXPECT_FULLY_WRITTEN(tau);
    EXPECT_GUARDS_INTACT(tau);
    EXPECT_FULLY_WRITTEN(new_positions);
    EXPECT_GUARDS_INTACT(new_positions);

    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        SCOPED_TRACE(fmt::format("length {} chunk {} row {} head {}", lengths[b], chunk, b, h));
        const Sequence<T>& sequence = *sequences[b];
        const LaneState<T>& lane = sequence.lanes[h];
        const int64_t row = b * heads + h, length = lengths[b];
        const auto u = [&](int64_t j) { return sequence.scores[j * heads + h]; };

        bool same_tau = true;
        for (int64_t t = 0; t < chunk; ++t) {
          const T actual = tau[(b * chunk + t) * heads + h], want = sequence.whole.tau[(length + t) * heads + h];
          same_tau &= actual == want;
          const double limit = (sizeof(T) == 8 ? 1e-12 : 1e-6) * std::max(1.0, std::abs(double{want}));
          ASSERT_TRUE(actual == want || std::abs(actual - want) <= limit) << t << ": " << actual << " want " << want;
        }
        (same_tau ? num_same_tau_ : num_other_tau_) += 1;
        const auto expect_key = [&](int64_t j, int64_t unborn, const int32_t* expiry, int32_t begin, int32_t end) {
          const auto in_chunk = [&](int64_t query) { return std::clamp<int64_t>(query - length, 0, chunk); };
          if (expiry) {
            ASSERT_EQ(*expiry, in_chunk(sequence.whole.expiry[j * heads + h])) << "key " << j;
          }
          if (!same_tau) return;
          int64_t want_begin = in_chunk(sequence.whole.frac_begin[j * heads + h]);
          int64_t want_end = in_chunk(sequence.whole.frac_end[j * heads + h]);
          if (want_begin >= want_end) want_begin = want_end = unborn;
          ASSERT_EQ(begin, want_begin) << "key " << j;
          ASSERT_EQ(end, want_end) << "key " << j;
        };
        for (int64_t s = row * topk; s < (row + 1) * topk; ++s) {
          const int64_t j = lane.slot_positions[s - row * topk];
          if (j >= 0) {
            expect_key(j, 0, &slot_expiry[s], slot_begin[s], slot_end[s]);
          } else {
            ASSERT_TRUE(slot_expiry[s] == 0 && slot_begin[s] == 0 && slot_end[s] == 0);
          }
        }
        for (int64_t r = 0; r < capacity; ++r) {
          const int64_t j = lane.pool_positions[r], at = row * capacity + r;
          if (r >= topk && j >= 0) {
            expect_key(j, 0, nullptr, pool_begin[at], pool_end[at]);
          } else {
            ASSERT_TRUE(pool_begin[at] == 0 && pool_end[at] == 0) << r;
          }
        }
        for (int64_t t = 0; t < chunk; ++t) {
          const int64_t j = length + t - spec_.window_size, at = row * chunk + t;
          if (j >= spec_.num_sinks) {
            expect_key(j, t, &arrival_expiry[at], arrival_begin[at], arrival_end[at]);
          } else {
            ASSERT_TRUE(arrival_expiry[at] == t && arrival_begin[at] == t && arrival_end[at] == t);
          }
        }

        LaneState<T> next;
        for (int64_t r = 0; r < new_capacity; ++r) {
          const int64_t source = pool_source[row * new_capacity + r];
          ASSERT_TRUE(source >= -1 && source < capacity + chunk);
          const int64_t j = source < 0          ? -1
                            : source < capacity ? lane.pool_positions[source]
                                                : length + source - capacity - spec_.window_size;
          next.pool_positions.push_back(j);
          next.pool_scores.push_back(j < 0 ? kMinusInfinity : u(j));
        }
        for (int64_t r = 0; r < topk; ++r) {
          const int64_t source = slot_source[row * topk + r];
          ASSERT_TRUE(source >= -1 && source < topk + chunk);
          const int64_t j = source < 0      ? -1
                            : source < topk ? lane.slot_positions[source]
                                            : length + source - topk - spec_.window_size;
          ASSERT_EQ(new_positions[row * topk + r], j);
          next.slot_positions.push_back(j);
          next.slot_scores.push_back(j < 0 ? std::numeric_limits<T>::quiet_NaN() : u(j));
        }
        expect_state(next, u, length + chunk, sequence.whole.tau[(length + chunk - 1) * heads + h]);
        shuffle_slots(next);
        sequences[b]->lanes[h] = next;
      }
      sequences[b]->length += chunk;
    }
  }

  int64_t num_same_tau() const { return num_same_tau_; }
  int64_t num_other_tau() const { return num_other_tau_; }

 private:
  template <class Score>
  void expect_state(const LaneState<T>& state, Score&& u, int64_t length, T tau) {
    std::vector<int64_t> ranked;
    for (int64_t j = spec_.num_sinks; j + spec_.window_size < length; ++j) ranked.push_back(j);
    std::sort(ranked.begin(), ranked.end(), [&](int64_t a, int64_t b) { return u(a) != u(b) ? u(a) > u(b) : a < b; });
    if (spec_.pool_size > 0 && std::ssize(ranked) > spec_.pool_size) ranked.resize(spec_.pool_size);
    std::vector<int64_t> slots = ranked;
    slots.resize(spec_.topk, -1);
    ASSERT_EQ(state.slot_positions, slots);
    for (size_t r = 0; r < state.pool_positions.size(); ++r) {
      if (r < ranked.size() && state.pool_positions[r] >= 0) {
        ASSERT_EQ(state.pool_positions[r], ranked[r]) << "rank " << r;
      } else {
        ASSERT_EQ(state.pool_positions[r], -1) << "rank " << r;
      }
      // Only an unlimited pool may leave keys out: those with p = 0, but topk + 1 stay.
      const bool needed = r < ranked.size() && (spec_.pool_size > 0 || std::ssize(ranked) <= spec_.topk ||
                                                static_cast<int64_t>(r) <= spec_.topk || u(ranked[r]) - tau > 0);
      if (needed) {
        ASSERT_GE(state.pool_positions[r], 0) << "rank " << r;
      }
    }
  }

  void shuffle_slots(LaneState<T>& state) {
    std::vector<int64_t> order(spec_.topk);
    std::iota(order.begin(), order.end(), 0);
    if (engine_() % 3) std::shuffle(order.begin(), order.end(), engine_);
    const LaneState<T> from = state;
    for (int64_t s = 0; s < spec_.topk; ++s) {
      state.slot_scores[s] = from.slot_scores[order[s]];
      state.slot_positions[s] = from.slot_positions[order[s]];
    }
  }

  Spec spec_;
  std::mt19937_64 engine_;
  int64_t num_same_tau_ = 0, num_other_tau_ = 0;
};

template <class T>
void run_case(const Spec& spec, ScoreKind kind, uint64_t seed, int64_t max_chunk, int64_t& same, int64_t& other) {
  SCOPED_TRACE(fmt::format("scores {} seed {} T {} H {} k {} w {} s {} m {} chunks to {}", name(kind), seed,
                           spec.seqlen, spec.num_kv_heads, spec.topk, spec.window_size, spec.num_sinks, spec.pool_size,
                           max_chunk));
  std::mt19937_64 engine(seed);
  ChunkTest<T> test(spec, seed);
  std::vector<Sequence<T>> sequences;
  const int64_t batch = 1 + static_cast<int64_t>(seed % 2);
  for (int64_t b = 0; b < batch; ++b) {
    sequences.push_back(test.start(make_scores(kind, 1, spec.seqlen, spec.num_kv_heads, seed * 2 + b)));
  }
  // Batch rows may have read different lengths. (Unlimited pools would then differ in capacity.)
  if (spec.pool_size > 0 && batch > 1 && spec.seqlen > 1)
    test.advance({&sequences[1]}, 1 + engine() % (spec.seqlen - 1));
  std::vector<Sequence<T>*> all;
  for (Sequence<T>& sequence : sequences) all.push_back(&sequence);
  while (sequences.back().length < spec.seqlen && !testing::Test::HasFailure()) {
    const int64_t rest = spec.seqlen - sequences.back().length;
    test.advance(all, std::min<int64_t>(rest, 1 + engine() % max_chunk));
  }
  same += test.num_same_tau();
  other += test.num_other_tau();
}

TEST(SelectChunk, AnyChunkingEqualsTheWholeSequence) {
  std::mt19937_64 engine(2);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  int64_t same = 0, other = 0;
  for (uint64_t seed = 0; seed < 1500 && !HasFailure(); ++seed) {
    Spec spec;
    spec.seqlen = pick(1, 80);
    spec.num_kv_heads = pick(1, 3);
    spec.topk = pick(0, 4) ? pick(1, 8) : pick(1, 100);
    spec.window_size = pick(0, 4) ? pick(1, 8) : pick(1, 100);
    spec.num_sinks = pick(0, 1) ? 0 : pick(1, 6);
    spec.pool_size = pick(0, 1) ? 0 : spec.topk + pick(1, 12);
    const ScoreKind kind = kAllScoreKinds[seed % std::size(kAllScoreKinds)];
    const int64_t max_chunk = std::array{1, 3, 17, 80}[seed % 4];
    seed % 5 ? run_case<float>(spec, kind, seed, max_chunk, same, other)
             : run_case<double>(spec, kind, seed, max_chunk, same, other);
  }
  EXPECT_LT(other * 20, same);  // tau to the bit, else the intervals were not compared
}

TEST(SelectChunk, LongChunksEqualTheWholeSequence) {
  int64_t same = 0, other = 0;
  uint64_t seed = 50;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t pool_size : {0, 200}) {
      Spec spec;
      spec.seqlen = 4000;
      spec.num_kv_heads = 2;
      spec.topk = 50;
      spec.window_size = 40;
      spec.num_sinks = 4;
      spec.pool_size = pool_size;
      run_case<float>(spec, kind, ++seed, 2500, same, other);
      if (HasFailure()) return;
    }
  }
  EXPECT_LT(other * 5, same);
}

TEST(SelectChunk, NamesTheCandidateThatIsNotFinite) {
  Spec spec;
  spec.seqlen = 30;
  spec.topk = 3;
  spec.window_size = 2;
  spec.num_sinks = 1;
  spec.pool_size = 5;
  ChunkTest<float> test(spec, 1);
  Sequence<float> sequence = test.start(make_scores(ScoreKind::kNormal, 1, 30, 1, 1));
  test.advance({&sequence}, 10);
  sequence.scores[13] = std::numeric_limits<float>::quiet_NaN();
  std::string message;
  try {
    test.advance({&sequence}, 10);
  } catch (const DataError& error) {
    message = error.what();
  }
  EXPECT_EQ(message, "candidate scores must be finite, got nan at batch row 0, position 5, head 0");
}

// Slots and pool are indexed by what the length says they hold.
TEST(SelectChunk, AStateThatDoesNotFitItsLengthIsRefused) {
  Spec spec;
  spec.seqlen = 40;
  spec.topk = 3;
  spec.window_size = 2;
  spec.num_sinks = 1;
  for (const int64_t pool_size : {0, 5}) {
    spec.pool_size = pool_size;
    ChunkTest<float> test(spec, 1);
    const Sequence<float> fresh = test.start(make_scores(ScoreKind::kNormal, 1, 40, 1, 1));
    Sequence<float> read = fresh;
    test.advance({&read}, 10);
    const auto error_of = [&](Sequence<float> sequence) -> std::string {
      try {
        test.advance({&sequence}, 4);
      } catch (const DataError& error) {
        return error.what();
      }
      return "none";
    };
    const auto says = [](const char* text) { return ::testing::HasSubstr(text); };
    Sequence<float> rewound = read, ahead = fresh, one_slot_less = read, one_score_less = read, one_score_more = read;
    rewound.length = 0;
    ahead.length = 10;
    one_slot_less.lanes[0].slot_positions[1] = -1;
    for (float& score : one_score_less.lanes[0].pool_scores) score = kMinusInfinity;
    one_score_more.length = 6;  // three candidates: as many slots as after ten tokens
    EXPECT_THAT(error_of(rewound), says("a state of 0 tokens must hold 0 selected keys, found 3 in batch row 0"));
    EXPECT_THAT(error_of(ahead), says("a state of 10 tokens must hold 3 selected keys, found 0 in batch row 0"));
    EXPECT_THAT(error_of(one_slot_less), says("a state of 10 tokens must hold 3 selected keys, found 2"));
    EXPECT_THAT(error_of(one_score_less), says("pool scores, found 0 in batch row 0, KV head 0"));
    EXPECT_THAT(error_of(one_score_more), says("a state of 6 tokens must hold 3 pool scores, found"));
    EXPECT_EQ(error_of(read), "none");
  }
}

}  // namespace
}  // namespace sparsek::test
