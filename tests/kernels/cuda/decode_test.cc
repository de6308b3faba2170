// decode_step on the GPU against kernels/cpu (which tests/kernels/decode compares with the reference): the state
// exactly, tau to docs/math.md section 8, outputs by row. Inputs are values that bfloat16 and float16 both hold, so
// that the CPU's float32 step computes on what the GPU reads.
#include "kernels/cuda/decode/decode_step.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>

#include "base/bf16.h"
#include "kernels/cpu/decode/decode_step.h"
#include "kernels/cpu/decode/threshold.h"
#include "tests/kernels/cuda/device.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

struct Case {
  int32_t window_size = 24, num_sinks = 3, topk = 20, pool_size = 45, num_heads = 8, num_kv_heads = 2, head_dim = 128;
  bool far_rotary = false, with_mass = true, ring_scores = true, half = false;
  Gate gate = Gate::kSoft;
  ScoreKind kind = ScoreKind::kNormal;
  int32_t batch = 2;
  std::string text() const {
    return fmt::format("w {} s {} k {} m {} heads {}/{} head_dim {} far {} mass {} ring {} half {} gate {} {} batch {}",
                       window_size, num_sinks, topk, pool_size, num_heads, num_kv_heads, head_dim, far_rotary,
                       with_mass, ring_scores, half, gate == Gate::kSoft ? "soft" : "hard", name(kind), batch);
  }
};

// A value with bfloat16's digits in float16's range.
float storable(float x) {
  return std::abs(x) < 1e-3f ? 0.0f : to_float(to_bf16(x));
}
uint16_t stored(float x, bool half) {
  if (!half) return to_bf16(x).bits;
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7e00;
  if (x == 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | ((bits >> 23 & 255) - 127 + 15) << 10 | (bits >> 13 & 1023));
}
float loaded(uint16_t bits, bool half) {
  return half ? half_to_float(bits) : to_float(BFloat16{bits});
}

// The state on the CPU, poisoned where nothing has been written.
struct HostState {
  explicit HostState(const Case& s)
      : k(s.batch * s.num_kv_heads * (s.num_sinks + s.window_size + s.topk) * s.head_dim, kNan),
        v(k),
        ring_k(s.far_rotary ? s.batch * s.num_kv_heads * s.window_size * s.head_dim : 0, kNan),
        ring_scores(s.batch * s.num_kv_heads * s.window_size, kNan),
        slot_scores(s.batch * s.num_kv_heads * s.topk, kNan),
        pool_scores(s.batch * s.num_kv_heads * s.pool_size, -kInfinity),
        ring_mass(ring_scores),
        slot_positions(slot_scores.size(), -1),
        lengths(s.batch, 0) {}
  std::vector<float> k, v, ring_k, ring_scores, slot_scores, pool_scores, ring_mass;
  std::vector<int64_t> slot_positions, lengths;
};
struct DeviceState {
  static std::vector<uint16_t> stored_all(const std::vector<float>& values, bool half) {
    std::vector<uint16_t> result;
    for (const float x : values) result.push_back(stored(x, half));
    return result;
  }
  DeviceState(const HostState& s, bool half)
      : k(stored_all(s.k, half)),
        v(stored_all(s.v, half)),
        ring_k(stored_all(s.ring_k, half)),
        ring_scores(s.ring_scores),
        slot_scores(s.slot_scores),
        pool_scores(s.pool_scores),
        ring_mass(s.ring_mass),
        slot_positions(s.slot_positions),
        lengths(s.lengths) {}
  DeviceArray<uint16_t> k, v, ring_k;
  DeviceArray<float> ring_scores, slot_scores, pool_scores, ring_mass;
  DeviceArray<int64_t> slot_positions, lengths;
};

// One step's inputs for a batch; heads stand at strides of their own.
struct Token {
  Token(const Case& s, std::mt19937_64& engine, const std::vector<int64_t>& lengths) {
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& to, int64_t count, float scale) {
      to.resize(count);
      for (float& x : to) x = storable(scale * normal(engine));
    };
    fill(q, int64_t{s.batch} * s.num_heads * s.head_dim, 1.5f);
    fill(k, int64_t{s.batch} * s.num_kv_heads * s.head_dim, 1);
    fill(v, int64_t{s.batch} * s.num_kv_heads * s.head_dim, 1);
    if (s.far_rotary) fill(q_far, std::ssize(q), 1.5f), fill(k_far, std::ssize(k), 1);
    for (int32_t b = 0; b < s.batch; ++b) {
      // Of the token that the scores are for: the new one, or the one that leaves the window.
      const int64_t position = lengths[b] - (s.ring_scores ? 0 : s.window_size);
      for (int32_t h = 0; h < s.num_kv_heads; ++h) {
        scores.push_back(position < 0 ? kNan : score(s.kind, position, normal, engine));
      }
    }
  }
  static float score(ScoreKind kind, int64_t position, std::normal_distribution<float>& normal,
                     std::mt19937_64& engine) {
    const float x = normal(engine), at = static_cast<float>(position);
    switch (kind) {
      case ScoreKind::kNormalSmall:
        return 0.05f * x;
      case ScoreKind::kNormalLarge:
        return 3 * x;
      case ScoreKind::kRising:
        return 0.001f * at;
      case ScoreKind::kRisingSteep:
        return 1.5f * at;
      case ScoreKind::kFalling:
        return -0.01f * at;
      case ScoreKind::kEqual:
        return 0.25f;
      case ScoreKind::kTies:
        return x < -1 ? -1.0f : x < 0 ? -0.0f : x < 0.5f ? 0.0f : x < 1 ? 0.5f : 1.5f;
      case ScoreKind::kFlatRoots:
        return std::round(3 * x);
      case ScoreKind::kOffset:
        return 8 + 0.3f * x;
      default:
        return x;
    }
  }
  std::vector<float> q, k, v, q_far, k_far, scores;
};

struct Results {
  std::vector<float> out, softmax_lse, tau;
};

DecodeStepParams sizes(const Case& s) {
  DecodeStepParams p{};
  p.q_stride_batch = p.q_far_stride_batch = int64_t{s.num_heads} * s.head_dim;
  p.k_stride_batch = p.k_far_stride_batch = p.v_stride_batch = int64_t{s.num_kv_heads} * s.head_dim;
  p.q_stride_head = p.q_far_stride_head = p.k_stride_head = p.k_far_stride_head = p.v_stride_head = s.head_dim;
  p.batch = s.batch, p.num_heads = s.num_heads, p.num_kv_heads = s.num_kv_heads, p.head_dim = s.head_dim;
  p.topk = s.topk, p.window_size = s.window_size, p.num_sinks = s.num_sinks, p.pool_size = s.pool_size;
  p.gate = s.gate;
  p.softmax_scale = 1.3 / std::sqrt(static_cast<double>(s.head_dim));
  return p;
}

template <class State, class Scores>
void set_state(DecodeStepParams& p, const Case& s, State& state, const Scores* scores) {
  p.state_k = state.k.data(), p.state_v = state.v.data();
  if (s.far_rotary) p.ring_k = state.ring_k.data();
  p.slot_scores = state.slot_scores.data(), p.slot_positions = state.slot_positions.data(),
  p.pool_scores = state.pool_scores.data();
  if (s.with_mass) p.ring_mass = state.ring_mass.data();
  p.lengths = state.lengths.data();
  if (s.ring_scores) {
    p.scores = scores, p.ring_scores = state.ring_scores.data();
  } else {
    p.candidate_scores = scores;
  }
}

Results step_host(const Case& s, HostState& state, const Token& token) {
  Results results{std::vector<float>(token.q.size()), std::vector<float>(int64_t{s.batch} * s.num_heads), {}};
  DecodeStepParams p = sizes(s);
  p.dtype = DType::kF32;
  p.q = token.q.data(), p.k = token.k.data(), p.v = token.v.data();
  if (s.far_rotary) p.q_far = token.q_far.data(), p.k_far = token.k_far.data();
  set_state(p, s, state, token.scores.data());
  p.out = results.out.data(), p.softmax_lse = results.softmax_lse.data();
  cpu::decode_step(p);
  for (int64_t unit = 0; unit < int64_t{s.batch} * s.num_kv_heads; ++unit) {
    const float* pool = state.pool_scores.data() + unit * s.pool_size;
    const auto count = static_cast<int>(std::find(pool, pool + s.pool_size, -kInfinity) - pool);
    results.tau.push_back(count > s.topk && s.gate == Gate::kSoft
                              ? static_cast<float>(cpu::sorted_threshold(pool, count, s.topk))
                              : -kInfinity);
  }
  return results;
}

// q and k, v with gaps between heads and batch rows.
Results step_device(const Case& s, const DeviceState& state, const Token& token) {
  const auto spread = [&](const std::vector<float>& values, int64_t heads) {
    std::vector<uint16_t> result(s.batch * (heads + 1) * (s.head_dim + 8), 0xffff);
    for (int64_t b = 0; b < s.batch && !values.empty(); ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t c = 0; c < s.head_dim; ++c) {
          result[(b * (heads + 1) + h) * (s.head_dim + 8) + c] =
              stored(values[(b * heads + h) * s.head_dim + c], s.half);
        }
      }
    }
    return result;
  };
  const DeviceArray<uint16_t> q(spread(token.q, s.num_heads)), k(spread(token.k, s.num_kv_heads)),
      v(spread(token.v, s.num_kv_heads)), q_far(spread(token.q_far, s.num_heads)),
      k_far(spread(token.k_far, s.num_kv_heads)), out(std::ssize(token.q));
  const DeviceArray<float> scores(token.scores), softmax_lse(int64_t{s.batch} * s.num_heads);
  DecodeStepParams p = sizes(s);
  p.dtype = s.half ? DType::kF16 : DType::kBF16;
  p.q = q.data(), p.k = k.data(), p.v = v.data();
  if (s.far_rotary) p.q_far = q_far.data(), p.k_far = k_far.data();
  p.q_stride_head = p.q_far_stride_head = p.k_stride_head = p.k_far_stride_head = p.v_stride_head = s.head_dim + 8;
  p.q_stride_batch = p.q_far_stride_batch = int64_t{s.num_heads + 1} * (s.head_dim + 8);
  p.k_stride_batch = p.k_far_stride_batch = p.v_stride_batch = int64_t{s.num_kv_heads + 1} * (s.head_dim + 8);
  set_state(p, s, state, static_cast<const float*>(scores.data()));
  p.out = out.data(), p.softmax_lse = softmax_lse.data();
  const DeviceArray<uint8_t> workspace(cuda::decode_step_workspace_bytes(p));
  cuda::decode_step(p, workspace.data(), nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "decode_step");
  Results results{{}, softmax_lse.to_vector(), {}};
  for (const uint16_t bits : out.to_vector()) results.out.push_back(loaded(bits, s.half));
  std::vector<cuda::DecodePlan> plans(int64_t{s.batch} * s.num_kv_heads);
  cuda::check_cuda(cudaMemcpy(plans.data(), workspace.data(), plans.size() * sizeof(plans[0]), cudaMemcpyDeviceToHost),
                   "cudaMemcpy");
  for (const cuda::DecodePlan& plan : plans) results.tau.push_back(plan.tau);
  return results;
}

void expect_results(const Case& s, const Results& actual, const Results& expected) {
  // P and out are rounded once each.
  const double limit = s.half ? 1e-3 : 8e-3;
  const Values out = as_doubles(actual.out), wanted = as_doubles(expected.out);
  for (int64_t row = 0; row < int64_t{s.batch} * s.num_heads; ++row) {
    const RowError error = row_error(&out[row * s.head_dim], &wanted[row * s.head_dim], s.head_dim);
    ASSERT_TRUE(error.relative() <= limit) << "row " << row << ": " << error.relative();
    ASSERT_TRUE(std::abs(actual.softmax_lse[row] - expected.softmax_lse[row]) <=
                5e-6 * std::max(1.0f, std::abs(expected.softmax_lse[row])))
        << "lse of row " << row << ": " << actual.softmax_lse[row] << " want " << expected.softmax_lse[row];
  }
  for (size_t unit = 0; unit < expected.tau.size(); ++unit) {
    ASSERT_TRUE(actual.tau[unit] == expected.tau[unit] ||
                std::abs(actual.tau[unit] - expected.tau[unit]) <= 1e-6 * std::max(1.0f, std::abs(expected.tau[unit])))
        << "tau " << unit << ": " << actual.tau[unit] << " want " << expected.tau[unit];
  }
}

bool same(const std::vector<float>& actual, const std::vector<float>& expected) {
  for (size_t n = 0; n < expected.size(); ++n) {
    if (!(actual[n] == expected[n] || (std::isnan(actual[n]) && std::isnan(expected[n])))) return false;
  }
  return actual.size() == expected.size();
}
std::vector<float> loaded_all(const DeviceArray<uint16_t>& values, bool half) {
  std::vector<float> result;
  for (const uint16_t bits : values.to_vector()) result.push_back(loaded(bits, half));
  return result;
}
void expect_state(const Case& s, const DeviceState& actual, const HostState& expected) {
  ASSERT_EQ(actual.lengths.to_vector(), expected.lengths);
  ASSERT_EQ(actual.slot_positions.to_vector(), expected.slot_positions);
  ASSERT_TRUE(same(actual.slot_scores.to_vector(), expected.slot_scores));
  ASSERT_TRUE(same(actual.pool_scores.to_vector(), expected.pool_scores));
  ASSERT_TRUE(same(actual.ring_scores.to_vector(), expected.ring_scores));
  ASSERT_TRUE(same(loaded_all(actual.k, s.half), expected.k));
  ASSERT_TRUE(same(loaded_all(actual.v, s.half), expected.v));
  ASSERT_TRUE(same(loaded_all(actual.ring_k, s.half), expected.ring_k));
  const std::vector<float> mass = actual.ring_mass.to_vector();
  for (size_t n = 0; n < mass.size(); ++n) {
    if (std::isnan(mass[n]) && std::isnan(expected.ring_mass[n])) continue;
    ASSERT_TRUE(std::abs(mass[n] - expected.ring_mass[n]) <= 1e-7 + 1e-4 * expected.ring_mass[n])
        << "ring_mass " << n << ": " << mass[n] << " want " << expected.ring_mass[n];
  }
}

// From empty: row b is b * lag tokens ahead.
void run_from_empty(const Case& s, int64_t steps, int64_t lag, uint64_t seed) {
  SCOPED_TRACE(fmt::format("{} seed {}", s.text(), seed));
  std::mt19937_64 engine(seed);
  HostState host(s);
  for (int64_t step = 0; step < lag * (s.batch - 1); ++step) {  // rows that are not to move are put back
    const Token token(s, engine, host.lengths);
    const HostState before = host;
    step_host(s, host, token);
    for (int32_t b = 0; b < s.batch; ++b) {
      if (step < b * lag) continue;
      const auto restore = [&](auto& to, const auto& from) {
        const int64_t size = std::ssize(to) / s.batch;
        std::copy(from.begin() + b * size, from.begin() + (b + 1) * size, to.begin() + b * size);
      };
      restore(host.k, before.k), restore(host.v, before.v), restore(host.ring_k, before.ring_k);
      restore(host.ring_scores, before.ring_scores), restore(host.slot_scores, before.slot_scores);
      restore(host.pool_scores, before.pool_scores), restore(host.ring_mass, before.ring_mass);
      restore(host.slot_positions, before.slot_positions), restore(host.lengths, before.lengths);
    }
  }
  const DeviceState device(host, s.half);
  for (int64_t step = 0; step < steps; ++step) {
    SCOPED_TRACE(fmt::format("step {}", step));
    const Token token(s, engine, host.lengths);
    const Results expected = step_host(s, host, token);
    expect_results(s, step_device(s, device, token), expected);
    if (step % 5 == 0 || step + 1 == steps) expect_state(s, device, host);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaDecode, EqualsCpuFromEmptyOn) {
  SKIP_WITHOUT_DEVICE();
  uint64_t seed = 1;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const bool far_rotary : {false, true}) {
      Case s;
      s.kind = kind, s.far_rotary = far_rotary;
      s.half = seed % 3 == 0, s.head_dim = seed % 2 ? 128 : 64, s.ring_scores = seed % 5 != 0;
      s.gate = seed % 7 == 0 ? Gate::kHard : Gate::kSoft;
      run_from_empty(s, 110, 37, seed++);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaDecode, Shapes) {
  SKIP_WITHOUT_DEVICE();
  struct Shape {
    int32_t w, s, k, m, heads, kv_heads, batch, steps, lag;
  };
  uint64_t seed = 100;
  for (const Shape& x : std::initializer_list<Shape>{{1, 0, 1, 2, 1, 1, 1, 40, 0},
                                                     {1, 3, 1, 2, 2, 1, 3, 30, 5},
                                                     {2, 1, 1, 3, 3, 3, 2, 30, 3},
                                                     {5, 17, 3, 40, 4, 2, 2, 60, 11},
                                                     {40, 4, 2, 3, 6, 2, 1, 60, 0},
                                                     {16, 16, 16, 17, 8, 1, 2, 70, 9},
                                                     {17, 0, 33, 34, 9, 1, 1, 120, 0},
                                                     {15, 2, 31, 64, 16, 1, 1, 90, 0},
                                                     {33, 1, 17, 90, 17, 1, 2, 80, 40},
                                                     {20, 5, 40, 41, 64, 1, 1, 80, 0},
                                                     {300, 4, 100, 400, 8, 8, 1, 30, 0},
                                                     {31, 2, 47, 50, 40, 2, 3, 90, 21},
                                                     {130, 20, 257, 300, 4, 4, 2, 60, 330}}) {
    for (const bool far_rotary : {false, true}) {
      Case s;
      s.window_size = x.w, s.num_sinks = x.s, s.topk = x.k, s.pool_size = x.m, s.num_heads = x.heads,
      s.num_kv_heads = x.kv_heads, s.batch = x.batch;
      s.far_rotary = far_rotary, s.half = seed % 2 == 0, s.head_dim = seed % 4 < 2 ? 64 : 128;
      s.with_mass = seed % 3 != 0, s.ring_scores = seed % 4 != 0;
      run_from_empty(s, x.steps, x.lag, seed++);
      if (HasFatalFailure()) return;
    }
  }
}

// A state as a long sequence leaves it.
HostState long_state(const Case& s, int64_t length, std::mt19937_64& engine) {
  HostState state(s);
  std::normal_distribution<float> normal;
  for (auto* values : {&state.k, &state.v, &state.ring_k}) {
    for (float& x : *values) x = storable(normal(engine));
  }
  for (float& x : state.ring_scores) x = Token::score(s.kind, length, normal, engine);
  std::fill(state.ring_mass.begin(), state.ring_mass.end(), 0.5f);
  for (int32_t b = 0; b < s.batch; ++b) state.lengths[b] = length + 77 * b;
  for (int64_t unit = 0; unit < int64_t{s.batch} * s.num_kv_heads; ++unit) {
    struct Key {
      float u;
      int64_t position;
    };
    std::vector<Key> pool;
    std::set<int64_t> positions;
    const int64_t candidates = state.lengths[unit / s.num_kv_heads] - s.window_size - s.num_sinks;
    while (std::ssize(positions) < std::min<int64_t>(s.pool_size, candidates)) {
      positions.insert(s.num_sinks + static_cast<int64_t>(engine() % candidates));
    }
    for (const int64_t position : positions) pool.push_back({Token::score(s.kind, position, normal, engine), position});
    std::sort(pool.begin(), pool.end(),
              [](const Key& a, const Key& b) { return a.u > b.u || (a.u == b.u && a.position < b.position); });
    for (size_t r = 0; r < pool.size(); ++r) state.pool_scores[unit * s.pool_size + r] = pool[r].u;
    pool.resize(std::min<size_t>(pool.size(), s.topk));
    std::shuffle(pool.begin(), pool.end(), engine);
    for (size_t r = 0; r < pool.size(); ++r) {
      state.slot_scores[unit * s.topk + r] = pool[r].u, state.slot_positions[unit * s.topk + r] = pool[r].position;
    }
  }
  return state;
}

TEST(CudaDecode, EqualsCpuInLongSequences) {
  SKIP_WITHOUT_DEVICE();
  struct Size {
    int32_t w, s, k, m, heads, kv_heads, batch;
    int64_t length;
  };
  uint64_t seed = 200;
  for (const Size& x : std::initializer_list<Size>{{1024, 4, 1024, 4096, 8, 2, 1, 1'000'003},
                                                   {1024, 0, 1024, 4096, 8, 2, 9, 9'001},
                                                   {1024, 0, 1024, 4097, 8, 2, 2, 5'500},
                                                   {500, 4, 1500, 6000, 12, 4, 3, 3'000'000'000},
                                                   {77, 1, 3000, 70'001, 4, 1, 1, 200'000},
                                                   {2000, 300, 33, 1024, 2, 1, 2, 5'000}}) {
    for (const ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kNormalSmall, ScoreKind::kTies, ScoreKind::kFlatRoots,
                                 ScoreKind::kRising, ScoreKind::kFalling, ScoreKind::kEqual}) {
      Case s;
      s.window_size = x.w, s.num_sinks = x.s, s.topk = x.k, s.pool_size = x.m, s.num_heads = x.heads,
      s.num_kv_heads = x.kv_heads, s.batch = x.batch;
      s.kind = kind, s.far_rotary = seed % 3 == 0, s.half = seed % 4 == 0, s.head_dim = seed % 5 == 0 ? 64 : 128;
      SCOPED_TRACE(fmt::format("{} seed {} length {}", s.text(), seed, x.length));
      std::mt19937_64 engine(seed++);
      HostState host = long_state(s, x.length, engine);
      const DeviceState device(host, s.half);
      for (int step = 0; step < (x.batch > 8 ? 1 : 3); ++step) {
        const Token token(s, engine, host.lengths);
        const Results expected = step_host(s, host, token);
        expect_results(s, step_device(s, device, token), expected);
        if (HasFatalFailure()) return;
      }
      expect_state(s, device, host);
      if (HasFatalFailure()) return;
    }
  }
}

// A NaN, or an infinity, becomes a candidate of one head: its outputs are NaN from then on, nobody else's change.
TEST(CudaDecode, ScoreThatIsNotFinitePoisonsItsHead) {
  SKIP_WITHOUT_DEVICE();
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (const Gate gate : {Gate::kSoft, Gate::kHard}) {
      for (const int64_t bad_position : {0, 5, 60}) {
        Case s;
        s.gate = gate, s.num_sinks = 2, s.ring_scores = bad_position != 5;
        SCOPED_TRACE(fmt::format("{} {} at {}", s.text(), bad, bad_position));
        std::mt19937_64 engine(7);
        HostState host(s);
        const DeviceState device(host, s.half);
        for (int64_t step = 0; step < 150; ++step) {
          Token token(s, engine, host.lengths);
          const Results expected = step_host(s, host, token);
          const int64_t scored = step - (s.ring_scores ? 0 : s.window_size);
          if (scored == bad_position) token.scores[1] = bad;  // batch row 0, KV head 1
          Results actual = step_device(s, device, token);
          const bool poisoned = bad_position >= s.num_sinks && step >= bad_position + s.window_size;
          const int64_t group = s.num_heads / s.num_kv_heads;
          for (int64_t head = group; head < 2 * group && poisoned; ++head) {
            ASSERT_TRUE(std::isnan(actual.softmax_lse[head])) << "step " << step;
            actual.softmax_lse[head] = expected.softmax_lse[head];
            for (int64_t c = head * s.head_dim; c < (head + 1) * s.head_dim; ++c) {
              ASSERT_TRUE(std::isnan(actual.out[c])) << "step " << step;
              actual.out[c] = expected.out[c];
            }
          }
          if (poisoned) actual.tau[1] = expected.tau[1];
          expect_results(s, actual, expected);
          if (HasFatalFailure()) return;
        }
        EXPECT_EQ(device.lengths.to_vector(), host.lengths);
      }
    }
  }
}

TEST(CudaDecode, RepeatsAreBitIdenticalAndRowsIndependent) {
  SKIP_WITHOUT_DEVICE();
  for (const int32_t batch : {1, 6}) {
    Case s;
    s.window_size = 300, s.topk = 500, s.pool_size = 2000, s.num_heads = 16, s.num_kv_heads = 4, s.batch = batch;
    std::mt19937_64 engine(11);
    const HostState host = long_state(s, 50'000, engine);
    const Token token(s, engine, host.lengths);
    Results first;
    std::vector<float> mass;
    for (int repeat = 0; repeat < 20; ++repeat) {
      const DeviceState device(host, s.half);
      const Results results = step_device(s, device, token);
      if (repeat == 0) first = results, mass = device.ring_mass.to_vector();
      ASSERT_EQ(results.out, first.out);
      ASSERT_EQ(results.softmax_lse, first.softmax_lse);
      ASSERT_EQ(results.tau, first.tau);
      ASSERT_EQ(device.ring_mass.to_vector(), mass);
    }
    // Batch rows the other way round.
    const auto turned = [&](auto values) {
      const int64_t size = std::ssize(values) / batch;
      auto result = values;
      for (int32_t b = 0; b < batch; ++b) {
        std::copy(values.begin() + b * size, values.begin() + (b + 1) * size, result.begin() + (batch - 1 - b) * size);
      }
      return result;
    };
    HostState other(s);
    other.k = turned(host.k), other.v = turned(host.v), other.ring_scores = turned(host.ring_scores),
    other.slot_scores = turned(host.slot_scores), other.pool_scores = turned(host.pool_scores),
    other.ring_mass = turned(host.ring_mass), other.slot_positions = turned(host.slot_positions),
    other.lengths = turned(host.lengths);
    Token other_token = token;
    for (auto* values : {&other_token.q, &other_token.k, &other_token.v, &other_token.scores})
      *values = turned(*values);
    const DeviceState device(other, s.half);
    EXPECT_EQ(turned(step_device(s, device, other_token).out), first.out);
    EXPECT_EQ(turned(device.ring_mass.to_vector()), mass);
  }
}

TEST(CudaDecode, SplitsCoverTheRows) {
  for (const int tiles : {2, 7, 8, 9, 128, 129, 1000, 40'000}) {
    for (const int64_t ctas : {1, 8, 100, 512, 5000}) {
      const cuda::DecodeSplits splits = cuda::decode_splits(ctas, tiles, 264);
      EXPECT_TRUE(splits.count >= 1 && splits.count <= 64 && splits.tiles % 8 == 0);
      EXPECT_GE(splits.count * splits.tiles, tiles);
      EXPECT_LT((splits.count - 1) * splits.tiles, tiles);  // none is empty
    }
  }
}

}  // namespace
}  // namespace sparsek::test
