// select_chunk on the GPU against kernels/cpu (which tests/kernels/select compares with whole sequences): expiries,
// fractional intervals and the new state exactly, tau to docs/math.md section 8. The state that goes on is the CPU's.
#include "kernels/cuda/select/select_chunk.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "kernels/cpu/select/select.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

struct Sizes {
  int32_t batch = 1, num_kv_heads = 2, topk = 5, window_size = 4, num_sinks = 1, pool_size = 12;
};
struct State {
  std::vector<float> slot_scores, pool_scores;
  std::vector<int64_t> slot_positions, lengths;
  int32_t pool_capacity = 0;
};
State empty_state(const Sizes& s) {
  const int64_t lanes = s.batch * s.num_kv_heads;
  State state;
  state.pool_capacity = s.pool_size > 0 ? s.pool_size : s.topk;
  state.slot_scores.assign(lanes * s.topk, kNan);
  state.slot_positions.assign(lanes * s.topk, -1);
  state.pool_scores.assign(lanes * state.pool_capacity, -kInfinity);
  state.lengths.assign(s.batch, 0);
  return state;
}

struct Outputs {
  std::vector<float> tau;
  std::vector<int32_t> slot_expiry, slot_begin, slot_end, pool_begin, pool_end, arrival_expiry, arrival_begin,
      arrival_end, slot_source, pool_source;
  std::vector<int64_t> positions;
};

SelectChunkParams describe(const Sizes& s, const State& state, int32_t chunk) {
  SelectChunkParams p{};
  p.dtype = DType::kF32;
  p.scores_strides = p.tau_strides = contiguous(chunk, s.num_kv_heads);
  p.batch = s.batch, p.chunk = chunk, p.num_kv_heads = s.num_kv_heads;
  p.topk = s.topk, p.window_size = s.window_size, p.num_sinks = s.num_sinks, p.pool_size = s.pool_size;
  p.pool_capacity = state.pool_capacity;
  p.new_pool_capacity = s.pool_size > 0 ? s.pool_size : state.pool_capacity + chunk;
  return p;
}
// visit(member of params, vector or device array, count) for every output.
template <class Buffers, class Visit>
void for_each_output(SelectChunkParams& p, Buffers& out, const Visit& visit) {
  const int64_t lanes = int64_t{p.batch} * p.num_kv_heads, slots = lanes * p.topk, keys = lanes * p.chunk,
                pool = lanes * p.pool_capacity;
  visit(p.tau, out.tau, keys);
  visit(p.slot_expiry, out.slot_expiry, slots);
  visit(p.slot_frac_begin, out.slot_begin, slots);
  visit(p.slot_frac_end, out.slot_end, slots);
  visit(p.pool_frac_begin, out.pool_begin, pool);
  visit(p.pool_frac_end, out.pool_end, pool);
  visit(p.arrival_expiry, out.arrival_expiry, keys);
  visit(p.arrival_frac_begin, out.arrival_begin, keys);
  visit(p.arrival_frac_end, out.arrival_end, keys);
  visit(p.new_slot_source, out.slot_source, slots);
  visit(p.new_slot_positions, out.positions, slots);
  visit(p.new_pool_source, out.pool_source, lanes * p.new_pool_capacity);
}

Outputs run_host(const Sizes& s, const State& state, const std::vector<float>& scores, int32_t chunk) {
  SelectChunkParams p = describe(s, state, chunk);
  Outputs out;
  for_each_output(p, out, [](auto*& member, auto& values, int64_t count) {
    values.resize(count);
    member = values.data();
  });
  p.candidate_scores = scores.data(), p.slot_scores = state.slot_scores.data(),
  p.slot_positions = state.slot_positions.data(), p.pool_scores = state.pool_scores.data(),
  p.lengths = state.lengths.data();
  cpu::select_chunk(p);
  return out;
}

Outputs run_device(const Sizes& s, const State& state, const std::vector<float>& scores, int32_t chunk) {
  SelectChunkParams p = describe(s, state, chunk);
  Outputs out;
  const DeviceArray<float> candidates(scores), slot_scores(state.slot_scores), pool_scores(state.pool_scores);
  const DeviceArray<int64_t> positions(state.slot_positions), lengths(state.lengths);
  p.candidate_scores = candidates.data(), p.slot_scores = slot_scores.data(), p.slot_positions = positions.data(),
  p.pool_scores = pool_scores.data(), p.lengths = lengths.data();
  // All outputs in one allocation, apart from each other and poisoned.
  int64_t bytes = 0;
  for_each_output(p, out, [&](auto*& member, auto& values, int64_t count) {
    bytes += (count * static_cast<int64_t>(sizeof(values[0])) + 255) / 256 * 256;
  });
  const DeviceArray<uint8_t> memory(bytes), workspace(cuda::select_chunk_workspace_bytes(p));
  int64_t at = 0;
  for_each_output(p, out, [&](auto*& member, auto& values, int64_t count) {
    using Member = std::remove_reference_t<decltype(member)>;
    member = static_cast<Member>(static_cast<void*>(memory.data() + at));
    at += (count * static_cast<int64_t>(sizeof(values[0])) + 255) / 256 * 256;
  });
  cuda::select_chunk(p, workspace.data(), nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "select_chunk");
  for_each_output(p, out, [&](auto*& member, auto& values, int64_t count) {
    values.resize(count);
    if (count == 0) return;
    cuda::check_cuda(cudaMemcpy(values.data(), member, count * sizeof(values[0]), cudaMemcpyDeviceToHost),
                     "cudaMemcpy");
  });
  return out;
}

// Lanes whose tau has the same bits everywhere, and others.
struct Seen {
  int64_t same_tau = 0, other_tau = 0;
};

void expect_equal(const Sizes& s, const State& state, int32_t chunk, const Outputs& actual, const Outputs& expected,
                  Seen& seen) {
  ASSERT_EQ(actual.slot_expiry, expected.slot_expiry);
  ASSERT_EQ(actual.arrival_expiry, expected.arrival_expiry);
  ASSERT_EQ(actual.slot_source, expected.slot_source);
  ASSERT_EQ(actual.positions, expected.positions);
  ASSERT_EQ(actual.pool_source, expected.pool_source);
  for (int64_t lane = 0; lane < int64_t{s.batch} * s.num_kv_heads; ++lane) {
    bool same = true;
    for (int64_t i = 0; i < chunk; ++i) {
      const int64_t at = (lane / s.num_kv_heads * chunk + i) * s.num_kv_heads + lane % s.num_kv_heads;
      const float tau = actual.tau[at], want = expected.tau[at];
      same &= tau == want;
      ASSERT_TRUE(tau == want || std::abs(tau - want) <= 1e-6f * std::max(1.0f, std::abs(want)))
          << "lane " << lane << " query " << i << ": " << tau << " want " << want;
    }
    (same ? seen.same_tau : seen.other_tau) += 1;
    if (!same) continue;  // then an interval may end a query apart
    const auto expect_part = [&](const std::vector<int32_t>& x, const std::vector<int32_t>& y, const char* what) {
      const int64_t each = std::ssize(y) / (int64_t{s.batch} * s.num_kv_heads);
      for (int64_t n = lane * each; n < (lane + 1) * each; ++n) {
        ASSERT_EQ(x[n], y[n]) << what << " lane " << lane << " entry " << n - lane * each;
      }
    };
    expect_part(actual.slot_begin, expected.slot_begin, "slot begin");
    expect_part(actual.slot_end, expected.slot_end, "slot end");
    expect_part(actual.pool_begin, expected.pool_begin, "pool begin");
    expect_part(actual.pool_end, expected.pool_end, "pool end");
    expect_part(actual.arrival_begin, expected.arrival_begin, "arrival begin");
    expect_part(actual.arrival_end, expected.arrival_end, "arrival end");
  }
}

State advance(const Sizes& s, const State& state, const std::vector<float>& scores, int32_t chunk, const Outputs& out,
              std::mt19937_64& engine) {
  State next = empty_state(s);
  const int64_t lanes = int64_t{s.batch} * s.num_kv_heads;
  next.pool_capacity = static_cast<int32_t>(std::ssize(out.pool_source) / lanes);
  next.pool_scores.assign(out.pool_source.size(), -kInfinity);
  const auto arrival = [&](int64_t lane, int64_t t) {
    return scores[(lane / s.num_kv_heads * chunk + t) * s.num_kv_heads + lane % s.num_kv_heads];
  };
  for (int64_t lane = 0; lane < lanes; ++lane) {
    std::vector<int64_t> order(s.topk);  // slots may stand in any order
    std::iota(order.begin(), order.end(), 0);
    if (lane % 2 == 0) std::shuffle(order.begin(), order.end(), engine);
    for (int64_t n = 0; n < s.topk; ++n) {
      const int64_t from = lane * s.topk + n, to = lane * s.topk + order[n], source = out.slot_source[from];
      next.slot_positions[to] = out.positions[from];
      if (source >= 0) {
        next.slot_scores[to] =
            source < s.topk ? state.slot_scores[lane * s.topk + source] : arrival(lane, source - s.topk);
      }
    }
    for (int64_t n = lane * next.pool_capacity; n < (lane + 1) * next.pool_capacity; ++n) {
      const int64_t source = out.pool_source[n];
      if (source < 0) continue;
      next.pool_scores[n] = source < state.pool_capacity ? state.pool_scores[lane * state.pool_capacity + source]
                                                         : arrival(lane, source - state.pool_capacity);
    }
  }
  for (int32_t b = 0; b < s.batch; ++b) next.lengths[b] = state.lengths[b] + chunk;
  return next;
}

// The scores of the keys that become candidates; NaN where none does.
std::vector<float> candidate_scores(const Sizes& s, const State& state, int32_t chunk, const Values& sequence,
                                    int64_t seqlen) {
  std::vector<float> scores;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < chunk; ++t) {
      const int64_t position = state.lengths[b] + t - s.window_size;
      for (int64_t h = 0; h < s.num_kv_heads; ++h) {
        scores.push_back(
            position < s.num_sinks ? kNan : static_cast<float>(sequence[(b * seqlen + position) * s.num_kv_heads + h]));
      }
    }
  }
  return scores;
}

void run_chunks(const Sizes& s, ScoreKind kind, uint64_t seed, const std::vector<int32_t>& chunks, Seen& seen) {
  SCOPED_TRACE(fmt::format("scores {} seed {} B {} H {} k {} w {} s {} m {}", name(kind), seed, s.batch, s.num_kv_heads,
                           s.topk, s.window_size, s.num_sinks, s.pool_size));
  std::mt19937_64 engine(seed);
  const int64_t seqlen = std::accumulate(chunks.begin(), chunks.end(), int64_t{0}) + 50;
  const Values sequence = make_scores(kind, s.batch, seqlen, s.num_kv_heads, seed);
  State state = empty_state(s);
  // Batch rows at different lengths that no candidate has reached yet.
  for (int32_t b = 1; b < s.batch; ++b) {
    state.lengths[b] = static_cast<int64_t>(engine() % std::min(s.window_size + s.num_sinks + 1, 50));
  }
  for (const int32_t chunk : chunks) {
    SCOPED_TRACE(fmt::format("length {} chunk {}", state.lengths[0], chunk));
    const std::vector<float> scores = candidate_scores(s, state, chunk, sequence, seqlen);
    const Outputs expected = run_host(s, state, scores, chunk);
    expect_equal(s, state, chunk, run_device(s, state, scores, chunk), expected, seen);
    if (testing::Test::HasFatalFailure()) return;
    state = advance(s, state, scores, chunk, expected, engine);
  }
}

TEST(CudaSelectChunk, EqualsCpuOnSmallCases) {
  SKIP_WITHOUT_DEVICE();
  std::mt19937_64 engine(1);
  const auto pick = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(engine));
  };
  Seen seen;
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Sizes s;
    s.batch = pick(1, 3), s.num_kv_heads = pick(1, 3), s.topk = pick(0, 4) ? pick(1, 8) : pick(1, 90);
    s.window_size = pick(0, 4) ? pick(1, 8) : pick(1, 90), s.num_sinks = pick(0, 1) ? 0 : pick(1, 6);
    s.pool_size = pick(0, 1) ? 0 : s.topk + pick(1, 12);
    std::vector<int32_t> chunks;
    for (int n = pick(1, 5); n > 0; --n) chunks.push_back(pick(0, 2) ? pick(1, 40) : pick(1, 3));
    run_chunks(s, kAllScoreKinds[seed % std::size(kAllScoreKinds)], seed, chunks, seen);
    if (HasFatalFailure()) return;
  }
  EXPECT_GE(seen.same_tau, 20 * seen.other_tau);
}

TEST(CudaSelectChunk, EqualsCpuOnLongChunks) {
  SKIP_WITHOUT_DEVICE();
  Seen seen;
  uint64_t seed = 1000;
  for (const ScoreKind kind : kAllScoreKinds) {
    run_chunks({2, 2, 100, 33, 2, 400}, kind, ++seed, {700, 1024, 31, 1, 1025, 3000}, seen);
    run_chunks({1, 1, 64, 17, 0, 0}, kind, ++seed, {300, 1, 2048, 500}, seen);
    run_chunks({1, 2, 1024, 1024, 4, 4096}, kind, ++seed, {3000, 2048, 2048, 4096}, seen);
    run_chunks({1, 1, 2000, 100, 0, 6000}, kind, ++seed, {5000, 3000, 777}, seen);
    if (HasFatalFailure()) return;
  }
  EXPECT_GE(seen.same_tau, 20 * seen.other_tau);
}

// A score that is not finite: tau is NaN from its query on, in later chunks too; indices stay in range.
TEST(CudaSelectChunk, ScoreThatIsNotFinitePoisonsItsHead) {
  SKIP_WITHOUT_DEVICE();
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (const int32_t pool_size : {0, 60}) {
      const Sizes s{2, 2, 20, 10, 2, pool_size};
      const int32_t chunk = 200, bad_query = 150;
      std::mt19937_64 engine(3);
      State state = empty_state(s);
      const Values sequence = make_scores(ScoreKind::kNormal, s.batch, 1000, s.num_kv_heads, 3);
      for (int round = 0; round < 3; ++round) {
        std::vector<float> scores = candidate_scores(s, state, chunk, sequence, 1000);
        Outputs expected;
        if (round == 0) {
          expected = run_host(s, state, scores, chunk);
          scores[bad_query * s.num_kv_heads + 1] = bad;  // batch row 0, KV head 1
        }
        const Outputs actual = run_device(s, state, scores, chunk);
        for (int64_t i = 0; i < chunk; ++i) {
          for (int64_t b = 0; b < s.batch; ++b) {
            for (int64_t h = 0; h < s.num_kv_heads; ++h) {
              const int64_t at = (b * chunk + i) * s.num_kv_heads + h;
              const bool poisoned = b == 0 && h == 1 && (round > 0 || i >= bad_query);
              ASSERT_EQ(std::isnan(actual.tau[at]), poisoned) << "round " << round << " query " << i;
              if (round > 0 || poisoned) continue;
              ASSERT_TRUE(actual.tau[at] == expected.tau[at] || std::abs(actual.tau[at] - expected.tau[at]) <= 1e-6f);
            }
          }
        }
        const auto capacity = static_cast<int32_t>(state.pool_capacity);
        for (const int32_t x : actual.slot_source) ASSERT_TRUE(x >= -1 && x < s.topk + chunk);
        for (const int32_t x : actual.pool_source) ASSERT_TRUE(x >= -1 && x < capacity + chunk);
        for (const auto* times :
             {&actual.slot_expiry, &actual.slot_begin, &actual.slot_end, &actual.pool_begin, &actual.pool_end,
              &actual.arrival_expiry, &actual.arrival_begin, &actual.arrival_end}) {
          for (const int32_t x : *times) ASSERT_TRUE(x >= 0 && x <= chunk);
        }
        state = advance(s, state, scores, chunk, actual, engine);
      }
    }
  }
}

TEST(CudaSelectChunk, RepeatsAreBitIdentical) {
  SKIP_WITHOUT_DEVICE();
  const Sizes s{1, 4, 256, 100, 4, 1024};
  std::mt19937_64 engine(5);
  State state = empty_state(s);
  const Values sequence = make_scores(ScoreKind::kNormal, 1, 6000, s.num_kv_heads, 5);
  const std::vector<float> first_scores = candidate_scores(s, state, 3000, sequence, 6000);
  state = advance(s, state, first_scores, 3000, run_host(s, state, first_scores, 3000), engine);
  const std::vector<float> scores = candidate_scores(s, state, 1500, sequence, 6000);
  const Outputs first = run_device(s, state, scores, 1500);
  for (int repeat = 0; repeat < 20; ++repeat) {
    const Outputs again = run_device(s, state, scores, 1500);
    ASSERT_EQ(again.tau, first.tau);
    ASSERT_EQ(again.arrival_begin, first.arrival_begin);
    ASSERT_EQ(again.arrival_end, first.arrival_end);
    ASSERT_EQ(again.slot_end, first.slot_end);
    ASSERT_EQ(again.pool_source, first.pool_source);
  }
}

}  // namespace
}  // namespace sparsek::test
