// The cases that attention's forward, backward and window_mass share, and what runs one of them: on every instruction
// set of this processor, in every element type.
#pragma once
#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/attention/plan.h"
#include "tests/kernels/attention/attention_case.h"
#include "tests/kernels/attention/isas.h"

namespace sparsek::test {

// body(rows) with fresh, poisoned buffers on every instruction set; float64 has one path only.
template <class T, class Body>
void on_every_isa(const Case<T>& c, const Body& body) {
  for (const cpu::Isa isa : isas()) {
    if (sizeof(T) == 8 && isa != cpu::Isa::kPortable) continue;
    cpu::force_isa(isa);
    SCOPED_TRACE(fmt::format("{}, {}, {}, seed {}", c.options.what, name(kDTypeOf<T>), cpu::name(isa), c.options.seed));
    Rows<T> rows(c);
    body(rows);
  }
  cpu::force_isa(cpu::best_isa());
}

// body(a value of the type) for each element type.
template <class Body>
void in_every_type(const Body& body) {
  body(float{});
  body(BFloat16{});
  body(double{});
}

inline CaseOptions small_case() {
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

using Cases = std::vector<CaseOptions>;

inline Cases head_dim_cases(CaseOptions options) {
  Cases cases;
  for (int64_t head_dim : {8, 24, 64, 80, 128, 256}) {
    options.what = fmt::format("head_dim {}", head_dim);
    options.spec.head_dim = head_dim;
    options.spec.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
    cases.push_back(options);
  }
  return cases;
}

// Lengths around the tile's of each number of heads a group.
inline Cases group_cases(CaseOptions options) {
  Cases cases;
  for (int64_t group : {1, 2, 3, 4, 7, 9}) {
    for (int64_t seqlen : lengths_around(cpu::tile_queries(static_cast<int32_t>(group)))) {
      options.what = fmt::format("{} heads a group, length {}", group, seqlen);
      options.spec.num_heads = 2 * group;
      options.spec.seqlen = seqlen;
      cases.push_back(options);
    }
  }
  return cases;
}

inline Cases score_cases(CaseOptions options) {
  options.spec.seqlen = 301;  // several runs of tiles
  options.spec.topk = 50;
  options.spec.pool_size = 70;
  options.spec.window_size = 37;
  Cases cases;
  for (ScoreKind kind : kAllScoreKinds) {
    for (Gate gate : {Gate::kSoft, Gate::kHard}) {
      options.what = fmt::format("{}, {}", name(kind), gate == Gate::kSoft ? "soft" : "hard");
      options.scores = kind;
      options.spec.gate = gate;
      cases.push_back(options);
    }
  }
  return cases;
}

inline Cases far_rotary_cases(CaseOptions options) {
  options.far_rotary = true;
  options.spec.topk = 40;
  options.spec.seqlen = 313;
  Cases cases;
  for (int64_t window : {1, 5, 64, 200}) {
    options.what = fmt::format("far rotary, window {}", window);
    options.spec.window_size = window;
    cases.push_back(options);
  }
  return cases;
}

inline Cases carried_cases(CaseOptions options) {
  options.spec.seqlen = 291;
  options.spec.topk = 33;
  Cases cases;
  for (int64_t chunk_begin : {1, 8, 63, 149, 200}) {
    for (bool far_rotary : {false, true}) {
      options.what = fmt::format("chunk from {}{}", chunk_begin, far_rotary ? ", far rotary" : "");
      options.chunk_begin = chunk_begin;
      options.far_rotary = far_rotary;
      cases.push_back(options);
    }
  }
  return cases;
}

inline CaseOptions packed_case(CaseOptions options) {
  options.what = "packed";
  options.spec.batch = 1;
  options.spec.seqlen = 300;
  options.spec.cu_seqlens = {0, 1, 40, 41, 170, 300};
  return options;
}

inline Cases random_cases(const CaseOptions& base, uint64_t seed, uint64_t count) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int64_t low, int64_t high) { return low + static_cast<int64_t>(random() % (high - low + 1)); };
  Cases cases;
  for (uint64_t n = 1; n <= count; ++n) {
    CaseOptions options = base;
    options.seed = n;
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
    options.scores = kAllScoreKinds[n % std::size(kAllScoreKinds)];
    options.spec.gate = pick(0, 1) ? Gate::kSoft : Gate::kHard;
    options.far_rotary = pick(0, 1);
    options.chunk_begin = pick(0, 1) * pick(0, options.spec.seqlen - 1);
    cases.push_back(options);
  }
  return cases;
}

}  // namespace sparsek::test
