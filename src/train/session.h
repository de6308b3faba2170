// What a configuration trains: the network, the dense teacher beside it, and what of it is learned.
#pragma once
#include <optional>

#include "train/config.h"
#include "train/network.h"

namespace sparsek::train {

struct Session {
  Network network;
  // The base (or loss.teacher) with its own dense attention, when a loss, a warm start or look-up heads need it.
  std::optional<Network> teacher;
};

// Reads the base, or draws weights; adds scorers and LoRA; marks what requires a gradient. Frozen matrices are kept in
// the compute type.
Session open_session(const TrainConfig& config);

// Whether the run, and not its begin alone, looks at a dense teacher.
inline bool learns_from_teacher(const TrainConfig& config) {
  return config.loss.kl > 0;
}

// Whether scorer.lookup_heads asks for anything: only sparsek has slopes.
inline bool holds_lookup_heads(const TrainConfig& config) {
  return config.attention.kind == "sparsek" && config.scorer.lookup_heads > 0;
}

at::Device parse_device(const std::string& text);  // throws UsageError naming run.device
at::ScalarType parse_dtype(const std::string& text);

// topk and window_size of a step: linear from schedule.*_from in schedule.anneal_steps.
struct Sizes {
  int64_t topk, window_size;
};
Sizes scheduled_sizes(const TrainConfig& config, int64_t step);

}  // namespace sparsek::train
