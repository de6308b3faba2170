// One attention problem for every driver of this folder: inputs as the reference takes them, the same values in a
// kernel's storage type, and what a run gives back.
#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/simd/dispatch.h"
#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"
#include "tests/support/poison.h"

namespace sparsek::test {

using reference::AttentionGradients;
using reference::AttentionInputs;
using reference::Indices;
using reference::Spec;

template <class Element>
using ScoreOf = std::conditional_t<std::is_same_v<Element, double>, double, float>;

template <class Element>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<Element, double>) return DType::kF64;
  if constexpr (std::is_same_v<Element, float>) return DType::kF32;
  return DType::kBF16;
}

// Per-row limits of docs/math.md section 8, with room for head_dim up to 64 and sums of a few hundred keys; bfloat16's
// are those of rounding P and the results to 8 bits.
struct Tolerance {
  double out, lse, dscores;
  double gradient;  // of dq, dk, dv; bfloat16: see expect_gradients
};
template <class Element>
constexpr Tolerance tolerance_of() {
  if constexpr (std::is_same_v<Element, double>) return {1e-11, 1e-11, 1e-10, 1e-10};
  if constexpr (std::is_same_v<Element, float>) return {1e-5, 5e-6, 1e-5, 3e-5};
  return {1.5e-2, 5e-3, 2e-2, 0};
}

struct Problem {
  Spec spec;
  AttentionInputs inputs;  // already rounded to the storage type
  Values dout, dlse;
  std::string text;

  int64_t q_row() const { return spec.num_heads * spec.head_dim; }
  int64_t kv_row() const { return spec.num_kv_heads * spec.head_dim; }
};

template <class Element>
Values round_to(Values values) {
  if constexpr (std::is_same_v<Element, double>) return values;
  if constexpr (std::is_same_v<Element, float>) return round_to_f32(std::move(values));
  return round_to_bf16(std::move(values));
}

template <class Element>
Problem make_problem(Spec spec, ScoreKind kind, bool far_rotary, uint64_t seed) {
  spec.precision = std::is_same_v<Element, double> ? reference::Precision::kFloat64 : reference::Precision::kFloat32;
  spec.softmax_scale = 1.3 / std::sqrt(static_cast<double>(spec.head_dim));
  const int64_t tokens = spec.batch * spec.seqlen;
  const int64_t q_size = tokens * spec.num_heads * spec.head_dim, kv_size = tokens * spec.num_kv_heads * spec.head_dim;
  const double q_std = seed % 3 == 0 ? 5.0 : 1.0;  // one softmax in three is peaked
  Problem problem;
  problem.spec = spec;
  problem.inputs = {round_to<Element>(normal(q_size, seed + 1, q_std)), round_to<Element>(normal(kv_size, seed + 2)),
                    round_to<Element>(normal(kv_size, seed + 3)),
                    make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed + 4)};
  if (far_rotary) {
    problem.inputs.q_far = round_to<Element>(normal(q_size, seed + 5, q_std));
    problem.inputs.k_far = round_to<Element>(normal(kv_size, seed + 6));
  }
  problem.dout = round_to<Element>(normal(q_size, seed + 7));
  problem.dlse = round_to_f32(normal(spec.batch * spec.num_heads * spec.seqlen, seed + 8));
  problem.text = fmt::format(
      "{} {} {} {} seed {} batch {} T {} heads {}/{} dim {} topk {} w {} sinks {} pool {} far {} documents {}",
      cpu::name(cpu::active_isa()), name(dtype_of<Element>()), name(kind), spec.gate == Gate::kSoft ? "soft" : "hard",
      seed, spec.batch, spec.seqlen, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.topk, spec.window_size,
      spec.num_sinks, spec.pool_size, far_rotary, spec.cu_seqlens.size());
  return problem;
}

// The problem's tensors as a kernel reads them.
template <class Element>
struct Storage {
  std::vector<Element> q, k, v, q_far, k_far, dout;
  std::vector<ScoreOf<Element>> scores, dlse;

  explicit Storage(const Problem& problem)
      : q(to_storage<Element>(problem.inputs.q)),
        k(to_storage<Element>(problem.inputs.k)),
        v(to_storage<Element>(problem.inputs.v)),
        q_far(to_storage<Element>(problem.inputs.q_far)),
        k_far(to_storage<Element>(problem.inputs.k_far)),
        dout(to_storage<Element>(problem.dout)),
        scores(to_storage<ScoreOf<Element>>(problem.inputs.scores)),
        dlse(to_storage<ScoreOf<Element>>(problem.dlse)) {}
};

struct Run {
  Values out, softmax_lse;  // [batch, seqlen, num_heads, head_dim], [batch, num_heads, seqlen]
  Values tau;               // [batch, seqlen, num_kv_heads]
  Values mass;              // [batch, seqlen, num_kv_heads] eq. 1b's sums of keys that left the window, decode only
  AttentionGradients grad;  // when asked for
  // Streaming runs: after some query, the positions selected in every (batch row, KV head), ascending.
  struct Selected {
    int64_t query;
    std::vector<Indices> positions;
  };
  std::vector<Selected> selected;
};

// [batch, seqlen, heads, head_dim] contiguous.
inline Strides contiguous(int64_t seqlen, int64_t heads, int64_t head_dim) {
  return {seqlen * heads * head_dim, heads * head_dim, head_dim};
}

// Everything of AttentionFwdParams that does not depend on how the rows were made.
template <class Element>
AttentionFwdParams common_params(const Spec& spec) {
  AttentionFwdParams params{};
  params.dtype = dtype_of<Element>();
  params.batch = static_cast<int32_t>(spec.batch);
  params.num_heads = static_cast<int32_t>(spec.num_heads);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.head_dim = static_cast<int32_t>(spec.head_dim);
  params.gate = spec.gate;
  params.softmax_scale = spec.softmax_scale;
  return params;
}

// Calls body() once for every instruction set this processor has. float64 has one path for all.
template <class Element, class Body>
void for_each_isa(const Body& body) {
  for (cpu::Isa isa : {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512}) {
    if (isa > cpu::best_isa() || (std::is_same_v<Element, double> && isa != cpu::Isa::kPortable)) continue;
    cpu::force_isa(isa);
    body();
  }
  cpu::force_isa(cpu::best_isa());
}

template <class Element>
void expect_outputs(const Run& run, const reference::AttentionOutputs& expected, const Problem& problem) {
  EXPECT_ROWS_CLOSE(run.out, expected.out, problem.spec.head_dim, tolerance_of<Element>().out);
  EXPECT_ELEMENTS_CLOSE(run.softmax_lse, expected.softmax_lse, tolerance_of<Element>().lse);
}

}  // namespace sparsek::test
