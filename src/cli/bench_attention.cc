// sparsek bench attention: SparseK attention beside torch's dense causal attention, alternating in one run.
#include <ATen/ops/arange.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <omp.h>
#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/source.h"
#include "cli/spread.h"
#include "cli/stopwatch.h"
#include "data/quote.h"
#include "kernels/cpu/simd/dispatch.h"
#include "model/memory_check.h"
#include "ops/ops.h"

namespace sparsek::cli {
namespace {

using at::Tensor;

constexpr int64_t kMaxSeqlen = int64_t{1} << 24, kMaxHeads = 1024;

void expect_range(const char* option, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) throw_usage("{}: expected {} to {}, found {}", option, low, high, value);
}

double time_ms(const std::function<void()>& work) {
  const Stopwatch time;
  work();
  return 1e3 * time.seconds();
}

struct Inputs {
  Tensor q, k, v, scores;            // sparsek's layouts
  Tensor dense_q, dense_k, dense_v;  // [1, num_heads, seqlen, head_dim], heads expanded
};

// q, k and v, drawn in float32: the least that a run takes.
void check_inputs_fit(const BenchAttentionConfig& config, int64_t seqlen) {
  const int64_t needed = seqlen * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * 4;
  const std::optional<int64_t> available = model::available_memory_bytes();
  if (!available || needed <= *available) return;
  throw_memory("--seqlen {}: expected at least {} MiB of memory, found {}", seqlen, needed >> 20, *available >> 20);
}

Inputs make_inputs(const BenchAttentionConfig& config, int64_t seqlen, at::ScalarType dtype) {
  const auto f32 = at::TensorOptions().dtype(at::kFloat);
  Inputs in;
  in.q = at::randn({1, seqlen, config.num_heads, config.head_dim}, f32).to(dtype);
  in.k = at::randn({1, seqlen, config.num_kv_heads, config.head_dim}, f32).to(dtype);
  in.v = at::randn({1, seqlen, config.num_kv_heads, config.head_dim}, f32).to(dtype);
  in.scores = config.scores == "rising"
                  ? at::arange(seqlen, f32).mul(1e-3).view({1, seqlen, 1}).repeat({1, 1, config.num_kv_heads})
                  : at::randn({1, seqlen, config.num_kv_heads}, f32);
  if (config.dense) {
    const int64_t group = config.num_heads / config.num_kv_heads;
    const auto expand = [&](const Tensor& x) {
      return at::repeat_interleave(x.transpose(1, 2), group, 1).contiguous();
    };
    in.dense_q = in.q.transpose(1, 2).contiguous();
    in.dense_k = expand(in.k);
    in.dense_v = expand(in.v);
  }
  if (config.backward) {
    for (Tensor* x : {&in.q, &in.k, &in.v, &in.scores, &in.dense_q, &in.dense_k, &in.dense_v}) {
      if (x->defined()) x->set_requires_grad(true);
    }
  }
  return in;
}

void forward_backward(const std::function<Tensor()>& forward, bool backward) {
  const Tensor out = forward();
  if (backward) out.backward(at::ones_like(out));
}

}  // namespace

int run_bench_attention(const BenchAttentionConfig& config) {
  if (config.scores != "random" && config.scores != "rising") {
    throw_usage("--scores: expected random or rising, found {}", in_quotes(config.scores));
  }
  expect_range("--repeats", config.repeats, 1, 1'000'000);
  expect_range("--kv-heads", config.num_kv_heads, 1, kMaxHeads);
  expect_range("--heads", config.num_heads, 1, kMaxHeads);
  if (config.num_heads % config.num_kv_heads != 0) {
    throw_usage("--heads: expected a multiple of --kv-heads ({}), found {}", config.num_kv_heads, config.num_heads);
  }
  expect_range("--topk", config.topk, 1, model::kMaxKeys);
  expect_range("--window", config.window_size, 1, model::kMaxKeys);
  expect_range("--sinks", config.num_sinks, 0, model::kMaxKeys);
  if (config.head_dim < 8 || config.head_dim > 256 || config.head_dim % 8 != 0) {
    throw_usage("--head-dim: expected a multiple of 8 from 8 to 256, found {}", config.head_dim);
  }
  for (const int64_t seqlen : config.seqlens) expect_range("--seqlen", seqlen, 1, kMaxSeqlen);
  set_threads(config.threads);
  const at::ScalarType dtype = parse_dtype(config.dtype);
  for (const int64_t seqlen : config.seqlens) check_inputs_fit(config, seqlen);
  const c10::AutoGradMode grad(config.backward);
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  if (!config.json) {
    fmt::print("{:>9} {:>12} {:>12} {:>12} {:>12} {:>8}\n", "tokens", "sparsek ms", "select ms", "mass ms", "dense ms",
               "ratio");
  }
  for (const int64_t seqlen : config.seqlens) {
    Inputs in = make_inputs(config, seqlen, dtype);
    const auto sparse = [&] {
      return std::get<0>(
          ops::attention(in.q, in.k, in.v, in.scores, config.topk, config.window_size, config.num_sinks));
    };
    const auto dense = [&] {
      return at::scaled_dot_product_attention(in.dense_q, in.dense_k, in.dense_v, {}, 0.0, /*is_causal=*/true);
    };
    forward_backward(sparse, config.backward);  // warm-up
    std::vector<double> sparse_ms, dense_ms, select_ms, mass_ms;
    for (int64_t i = 0; i < config.repeats && !interrupted(); ++i) {
      sparse_ms.push_back(time_ms([&] { forward_backward(sparse, config.backward); }));
      const c10::AutoGradMode no_grad(false);
      select_ms.push_back(time_ms([&] { ops::select(in.scores, config.topk, config.window_size, config.num_sinks); }));
      mass_ms.push_back(time_ms([&] { ops::window_mass(in.q, in.k, config.window_size, config.num_sinks); }));
      const c10::AutoGradMode with_grad(config.backward);
      // Dense attention is quadratic: beyond a few seconds one run says enough.
      if (config.dense && (dense_ms.empty() || dense_ms.front() < 3000)) {
        dense_ms.push_back(time_ms([&] { forward_backward(dense, config.backward); }));
      }
    }
    if (interrupted()) return kInterruptedExitCode;
    const Spread sparsek = spread_of(sparse_ms), select = spread_of(select_ms), mass = spread_of(mass_ms);
    nlohmann::ordered_json row{{"seqlen", seqlen},
                               {"sparsek", to_json(sparsek, "_ms")},
                               {"select", to_json(select, "_ms")},
                               {"window_mass", to_json(mass, "_ms")},
                               {"us_per_token", 1e3 * sparsek.median / static_cast<double>(seqlen)}};
    double ratio = 0;
    if (!dense_ms.empty()) {
      const Spread dense_timing = spread_of(dense_ms);
      ratio = dense_timing.median / sparsek.median;
      row["dense"] = to_json(dense_timing, "_ms");
      row["dense_over_sparsek"] = ratio;
    }
    if (!config.json) {
      fmt::print("{:>9} {:>12.2f} {:>12.2f} {:>12.2f} {:>12} {:>8}\n", with_separators(seqlen), sparsek.median,
                 select.median, mass.median, dense_ms.empty() ? "-" : fmt::format("{:.2f}", spread_of(dense_ms).median),
                 dense_ms.empty() ? "-" : fmt::format("{:.1f}", ratio));
    }
    results.push_back(std::move(row));
  }
  if (config.json) {
    const nlohmann::ordered_json object{{"dtype", config.dtype},
                                        {"num_heads", config.num_heads},
                                        {"num_kv_heads", config.num_kv_heads},
                                        {"head_dim", config.head_dim},
                                        {"topk", config.topk},
                                        {"window_size", config.window_size},
                                        {"num_sinks", config.num_sinks},
                                        {"scores", config.scores},
                                        {"backward", config.backward},
                                        {"threads", omp_get_max_threads()},
                                        {"isa", cpu::name(cpu::active_isa())},
                                        {"results", results}};
    print_json(object, 2);
  }
  return 0;
}

}  // namespace sparsek::cli
