// sparsek bench model: reading and greedy decoding speed of a model behind contexts of several lengths, on random
// tokens; several documents are decoded side by side from copies of the state behind one.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "cli/spread.h"
#include "cli/stopwatch.h"
#include "model/token_ids.h"

namespace sparsek::cli {
namespace {

// Untimed steps of every decoding: a GPU's libraries make their workspaces, and the step is recorded.
constexpr int64_t kWarmUpSteps = 3;

void check(const BenchModelConfig& config) {
  const auto at_least_one = [](const char* option, const std::vector<int64_t>& values) {
    for (const int64_t value : values) {
      if (value < 1) throw_usage("{}: expected 1 or more, found {}", option, value);
    }
  };
  at_least_one("--context", config.contexts);
  at_least_one("--batch", config.batches);
  at_least_one("--decode-tokens", {config.decode_tokens});
  at_least_one("--repeats", {config.repeats});
  const int64_t widest = *std::max_element(config.batches.begin(), config.batches.end());
  if (widest > 65536) throw_usage("--batch: expected 65536 or less, found {}", widest);
  if (widest > 1 && config.model.attention.kind != model::AttentionKind::kSparsek) {
    throw_usage("--batch {}: expected --attention sparsek for several documents, found {}", widest,
                model::name(config.model.attention.kind));
  }
}

class Measurement {
 public:
  Measurement(const BenchModelConfig& config, const model::Transformer& model) : config_(config), model_(model) {}

  // Seconds to read `context` random tokens into `state` and have the next one; nothing when interrupted.
  std::optional<double> read(int64_t context, model::DecodeState& state) {
    Progress progress(reading_on(model_), "tokens", context);
    const Stopwatch time;
    at::Tensor hidden;
    for (int64_t done = 0; done < context;) {
      const std::vector<int32_t> ids = random_ids(std::min(tokens_at_once(config_.model), context - done));
      hidden = model_.forward(model::as_tensor(ids), state);
      done += static_cast<int64_t>(ids.size());
      progress.update(done);
      if (interrupted()) return std::nullopt;
    }
    model_.most_likely(hidden.slice(0, hidden.size(0) - 1));
    return time.seconds();
  }

  // Milliseconds of each step that decodes the most likely token of every document, from another random token each, so
  // that copies of one state part ways; nothing when interrupted.
  std::optional<std::vector<double>> decode(model::DecodeState& state) {
    const std::vector<int32_t> first = random_ids(state.documents());
    at::Tensor ids = model::as_tensor(first);
    std::vector<double> steps;
    for (int64_t i = -kWarmUpSteps; i < config_.decode_tokens; ++i) {
      if (interrupted()) return std::nullopt;
      const Stopwatch time;
      ids = model_.most_likely(model_.forward(ids, state));
      if (i >= 0) steps.push_back(time.seconds() * 1e3);
    }
    return steps;
  }

 private:
  std::vector<int32_t> random_ids(int64_t count) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(random_() % static_cast<uint64_t>(model_.config().vocab_size));
    return ids;
  }

  const BenchModelConfig& config_;
  const model::Transformer& model_;
  std::mt19937_64 random_{1};
};

}  // namespace

int run_bench_model(const BenchModelConfig& config) {
  check(config);
  std::vector<int64_t> batches = config.batches;
  std::sort(batches.begin(), batches.end(), std::greater<>());  // a single document's steps change what was read: last
  batches.erase(std::unique(batches.begin(), batches.end()), batches.end());
  const int64_t longest = *std::max_element(config.contexts.begin(), config.contexts.end());
  const Stopwatch load_time;
  const model::Transformer model =
      open_model(config.model, resolve_model(config.model.model), longest + kWarmUpSteps + config.decode_tokens,
                 batches.front() + (batches.front() > 1 ? 1 : 0));
  const double load_seconds = load_time.seconds();
  const c10::InferenceMode inference;
  Measurement measurement(config, model);
  {
    model::DecodeState state = model.new_state();  // a GPU loads its kernels
    if (!measurement.read(std::min(longest, tokens_at_once(config.model)), state)) return kInterruptedExitCode;
  }
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  if (!config.json) {
    fmt::print("{:>9} {:>6} {:>16} {:>16} {:>12}\n", "context", "batch", "read tokens/s", "decode tokens/s", "state");
  }
  for (const int64_t context : config.contexts) {
    std::vector<double> read_seconds;
    model::DecodeState state;
    for (int64_t i = 0; i < config.repeats; ++i) {
      state = model.new_state();
      const std::optional<double> seconds = measurement.read(context, state);
      if (!seconds) return kInterruptedExitCode;
      read_seconds.push_back(*seconds);
    }
    for (const int64_t batch : batches) {
      model::DecodeState documents =
          batch > 1 ? model.join(std::vector<const model::DecodeState*>(batch, &state)) : state;
      const auto steps = measurement.decode(documents);
      if (!steps) return kInterruptedExitCode;
      double decode_ms = 0;
      for (const double step : *steps) decode_ms += step;
      const double read_rate = static_cast<double>(context) / spread_of(read_seconds).median;
      const double decode_rate = static_cast<double>(batch * config.decode_tokens) / decode_ms * 1e3;
      const int64_t state_bytes = documents.size_in_bytes();
      if (!config.json) {
        fmt::print("{:>9} {:>6} {:>16.0f} {:>16.1f} {:>12}\n", with_separators(context), batch, read_rate, decode_rate,
                   human_bytes(static_cast<double>(state_bytes)));
        std::fflush(stdout);
      }
      results.push_back({{"context", context},
                         {"batch", batch},
                         {"read_tokens_per_second", read_rate},
                         {"read_seconds", to_json(spread_of(read_seconds))},
                         {"decode_tokens_per_second", decode_rate},
                         {"decode_step_ms", to_json(spread_of(*steps))},
                         {"state_bytes", state_bytes}});
    }
  }
  if (config.json) {
    const nlohmann::ordered_json object{
        {"model", config.model.model},           {"attention", describe(model.attention())},
        {"dtype", config.model.dtype},           {"device", model.device().str()},
        {"chunk", tokens_at_once(config.model)}, {"threads", omp_get_max_threads()},
        {"peak_rss_bytes", peak_rss_bytes()},    {"load_seconds", load_seconds},
        {"weight_bytes", model.weight_bytes()},  {"results", results}};
    print_json(object, 2);
  }
  return 0;
}

}  // namespace sparsek::cli
