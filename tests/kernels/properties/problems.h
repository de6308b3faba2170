// The problems that streaming_test and gradients_test go through, and how they are cut into chunks.
#pragma once
#include <random>

#include "tests/kernels/properties/problem.h"

namespace sparsek::test {

inline Spec spec_of(int64_t seqlen, int64_t topk, int64_t window_size, int64_t num_sinks, int64_t pool_size) {
  Spec spec;
  spec.batch = 2;
  spec.seqlen = seqlen;
  spec.num_heads = 6;
  spec.num_kv_heads = 2;
  spec.head_dim = 16;
  spec.topk = topk;
  spec.window_size = window_size;
  spec.num_sinks = num_sinks;
  spec.pool_size = pool_size;
  return spec;
}

inline std::vector<Spec> specs() {
  std::vector<Spec> all = {spec_of(151, 12, 10, 3, 16), spec_of(130, 8, 1, 0, 20), spec_of(90, 5, 24, 30, 9),
                           spec_of(40, 60, 7, 2, 64), spec_of(30, 4, 40, 2, 8)};
  all[1].head_dim = 24;
  all[2].num_heads = all[2].num_kv_heads = 2;
  all[3].head_dim = 64;
  return all;
}

// Chunks of 1, below w, above w + k, everything and mixed; with an unlimited pool (whose time grows) only two of them.
inline std::vector<Indices> chunkings(const Spec& spec, int64_t pool_size) {
  const int64_t w = spec.window_size, far = spec.window_size + spec.topk + 1;
  std::mt19937_64 engine(5);
  Indices mixed;
  for (int64_t read = 0; read < spec.seqlen;) {
    const int64_t sizes[] = {1, 2, std::max<int64_t>(1, w - 1), w, w + 1, far, 33};
    mixed.push_back(std::min(sizes[engine() % 7], spec.seqlen - read));
    read += mixed.back();
  }
  const auto equal = [&](int64_t size) {
    Indices sizes;
    for (int64_t read = 0; read < spec.seqlen; read += sizes.back())
      sizes.push_back(std::min(size, spec.seqlen - read));
    return sizes;
  };
  if (pool_size == 0) return {equal(std::max<int64_t>(1, w / 2)), mixed};
  return {equal(1), equal(std::max<int64_t>(1, w / 2)), equal(far), equal(spec.seqlen), mixed};
}

// Calls body(problem) over shapes, both gates, both rotary modes and the score kinds in turn, others for each
// instruction set.
template <class Element, class Body>
void for_each_problem(const Body& body) {
  size_t count = 5 * static_cast<size_t>(cpu::active_isa());
  for (const Spec& base : specs()) {
    for (Gate gate : {Gate::kSoft, Gate::kHard}) {
      for (bool far_rotary : {false, true}) {
        Spec spec = base;
        spec.gate = gate;
        const ScoreKind kind = kAllScoreKinds[count++ % std::size(kAllScoreKinds)];
        const Problem problem = make_problem<Element>(spec, kind, far_rotary, 70 + count);
        SCOPED_TRACE(problem.text);
        body(problem);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace sparsek::test
