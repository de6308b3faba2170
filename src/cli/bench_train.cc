// sparsek bench train: tokens a second and peak memory of whole training steps (forward, backward, optimiser) on random
// tokens, one row a length; dense attention with each of torch's backends in turn.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/randint.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/spread.h"
#include "cli/stopwatch.h"
#include "cli/train.h"
#include "data/quote.h"
#include "train/device_memory.h"
#include "train/optimiser.h"
#include "train/session.h"
#include "train/token_loss.h"

namespace sparsek::cli {
namespace {

constexpr int64_t kMaxSeqlen = int64_t{1} << 24;
constexpr double kWarmUpSeconds = 1;       // a first step that took longer is warm-up enough
constexpr double kWorthMoreLengths = 0.8;  // of the fastest backend's rate: slower ones are not tried at longer lengths
constexpr int64_t kMinTimedSteps = 2;

// SmolLM2-135M's shape, and what such a run needs to be said: any of it can be overridden.
const std::vector<std::string> kDefaults = {
    "data.task=recall",      "model.num_layers=30",       "model.dim=576",
    "model.ffn_dim=1536",    "model.num_heads=9",         "model.num_kv_heads=3",
    "model.head_dim=64",     "attention.topk=512",        "attention.window_size=512",
    "attention.num_sinks=0", "trainable.recompute=false", "loss.rows=8192"};

void use_backend(const std::string& name) {
  at::Context& context = at::globalContext();
  context.setSDPUseFlash(name == "flash");
  context.setSDPUseCuDNN(name == "cudnn");
  context.setSDPUseMemEfficient(name == "efficient");
  context.setSDPUseMath(name == "math");
}

class Steps {
 public:
  explicit Steps(const train::TrainConfig& config)
      : config_(config),
        session_(train::open_session(config)),
        optimiser_(session_.network.parameters(), config.optimiser, kMaxSteps) {}

  at::Device device() const { return session_.network.options().device; }
  int64_t num_parameters() const { return session_.network.config().num_parameters(); }

  void set_length(int64_t seqlen) {
    at::Generator generator = at::detail::createCPUGenerator(static_cast<uint64_t>(config_.run.seed));
    const int64_t vocab_size = session_.network.config().vocab_size;
    const auto draw = [&] { return at::randint(0, vocab_size, {config_.data.batch, seqlen}, generator, at::kLong); };
    ids_ = draw();
    targets_ = draw();
  }

  // As train/trainer.cc makes it, from tokens in the host's memory to updated weights. The mean loss.
  double operator()() {
    const train::Network& network = session_.network;
    const at::Tensor ids = ids_.to(device()), targets = targets_.to(device()).flatten();
    const double scale = 1.0 / static_cast<double>(targets.numel());
    const at::Tensor hidden = network.forward(ids, network.layout(ids.size(0), ids.size(1)), nullptr);
    const train::TokenLoss loss = train::token_loss(hidden.flatten(0, 1), network.parameters().output_matrix(), targets,
                                                    {.rows = config_.loss.rows});
    loss.total.mul(scale).backward();
    const double value = loss.next_token.item<double>() * scale;
    optimiser_.apply(step_++, std::isfinite(value));
    train::wait_for(device());
    return value;
  }

  // After a step that ended in an error.
  void forget_gradients() {
    train::visit_parameters(session_.network.parameters(), [](const std::string&, at::Tensor& tensor, train::Group) {
      tensor.mutable_grad() = at::Tensor();
    });
  }

 private:
  static constexpr int64_t kMaxSteps = 1'000'000;  // of the rate's schedule: no run gets there
  train::TrainConfig config_;
  train::Session session_;
  train::Optimiser optimiser_;
  at::Tensor ids_, targets_;
  int64_t step_ = 0;
};

// One length with one backend; an error that ends it (no memory, a backend that refuses) is its result.
nlohmann::ordered_json measure(Steps& steps, const BenchTrainConfig& config, int64_t tokens) {
  try {
    train::forget_peak_memory(steps.device());
    const Stopwatch warm_up;
    double loss = steps();
    if (warm_up.seconds() < kWarmUpSeconds && !interrupted()) loss = steps();
    std::vector<double> seconds, rates;
    const Stopwatch all;
    while (static_cast<int64_t>(seconds.size()) < config.steps && !interrupted() &&
           (static_cast<int64_t>(seconds.size()) < kMinTimedSteps || all.seconds() < config.seconds)) {
      const Stopwatch time;
      loss = steps();
      seconds.push_back(time.seconds());
      rates.push_back(static_cast<double>(tokens) / seconds.back());
    }
    if (seconds.empty()) return {};  // interrupted
    return {{"tokens_per_second", to_json(spread_of(rates))},
            {"step_seconds", to_json(spread_of(seconds))},
            {"timed_steps", seconds.size()},
            {"peak_memory_bytes", train::peak_memory_bytes(steps.device())},
            {"loss", loss}};
  } catch (const c10::Error& error) {  // what() would add a backtrace
    steps.forget_gradients();
    return {{"error", error.what_without_backtrace()}};
  } catch (const std::runtime_error& error) {  // our CUDA library's
    steps.forget_gradients();
    return {{"error", error.what()}};
  }
}

int run(const BenchTrainConfig& bench) {
  for (const int64_t seqlen : bench.seqlens) {
    if (seqlen < 1 || seqlen > kMaxSeqlen) throw_usage("--seqlen: expected 1 to {}, found {}", kMaxSeqlen, seqlen);
  }
  if (bench.steps < kMinTimedSteps) throw_usage("--steps: expected {} or more, found {}", kMinTimedSteps, bench.steps);
  for (const std::string& name : bench.backends) {
    if (name != "flash" && name != "cudnn" && name != "efficient" && name != "math") {
      throw_usage("--backends: expected flash, cudnn, efficient or math, found {}", in_quotes(name));
    }
  }
  std::vector<std::string> overrides = kDefaults;
  overrides.insert(overrides.end(), bench.overrides.begin(), bench.overrides.end());
  const train::TrainConfig config = train::load_config("", overrides);
  if (config.recurrent.chunk > 0)
    throw_usage("recurrent.chunk: expected 0: whole rows are timed, found {}", config.recurrent.chunk);
  if (config.loss.kl > 0) throw_usage("loss.kl: expected 0: no teacher is timed, found {}", config.loss.kl);
  if (config.run.threads > 0) at::set_num_threads(static_cast<int>(config.run.threads));
  if (config.attention.deterministic) at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  Steps steps(config);

  std::vector<std::string> backends = {""};
  if (config.attention.kind == "dense" && !steps.device().is_cpu()) backends = bench.backends;
  std::vector<int64_t> seqlens = bench.seqlens;
  std::sort(seqlens.begin(), seqlens.end());
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  if (!bench.json) {
    fmt::print("{:>9} {:>10} {:>12} {:>10} {:>10}\n", "tokens", "backend", "tokens/s", "us/token", "memory");
  }
  for (const int64_t seqlen : seqlens) {
    steps.set_length(seqlen);
    const int64_t tokens = config.data.batch * seqlen;
    std::vector<std::pair<std::string, double>> rates;
    for (const std::string& backend : backends) {
      if (!backend.empty()) use_backend(backend);
      nlohmann::ordered_json row{{"seqlen", seqlen}, {"batch", config.data.batch}};
      if (!backend.empty()) row["backend"] = backend;
      const nlohmann::ordered_json measured = measure(steps, bench, tokens);
      if (interrupted()) return kInterruptedExitCode;
      row.update(measured);
      const bool has_run = row.contains("tokens_per_second");
      const double rate = has_run ? row["tokens_per_second"]["median"].get<double>() : 0;
      if (has_run) rates.emplace_back(backend, rate);
      if (!bench.json) {
        fmt::print("{:>9} {:>10} {:>12} {:>10} {:>10}\n", with_separators(seqlen), backend.empty() ? "-" : backend,
                   has_run ? with_separators(static_cast<int64_t>(rate)) : "-",
                   has_run ? fmt::format("{:.2f}", 1e6 / rate) : "-",
                   has_run ? human_bytes(row["peak_memory_bytes"].get<double>()) : row["error"].get<std::string>());
      }
      results.push_back(std::move(row));
    }
    double best = 0;
    for (const auto& [backend, rate] : rates) best = std::max(best, rate);
    std::vector<std::string> kept;
    for (const auto& [backend, rate] : rates) {
      if (rate >= kWorthMoreLengths * best) kept.push_back(backend);
    }
    if (!kept.empty()) backends = kept;
  }
  if (bench.json) {
    const nlohmann::ordered_json object{{"attention", config.attention.kind},
                                        {"device", config.run.device},
                                        {"dtype", config.run.dtype},
                                        {"parameters", steps.num_parameters()},
                                        {"recompute", config.trainable.recompute},
                                        {"config", train::config_text(config)},
                                        {"results", results}};
    print_json(object, 2);
  }
  return 0;
}

}  // namespace

int run_bench_train(const BenchTrainConfig& config) {
  return with_keys([&] { return run(config); });
}

}  // namespace sparsek::cli
