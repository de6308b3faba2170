// A training run from its configuration to its last step: data, network, optimiser, checkpoints, metrics.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "train/config.h"

namespace sparsek::train {

struct Evaluation {
  double loss = 0, accuracy = 0;  // next token: natural log, and how often it is the most likely one
};

struct StepReport {
  int64_t step = 0, steps = 0;  // done, of
  double loss = 0, kl = 0;      // of this step's tokens; kl 0 without a teacher
  double rate = 0, gradient_norm = 0;
  int64_t tokens = 0, skipped_steps = 0;  // of the whole run
  double tokens_per_second = 0, seconds_left = 0;
  int64_t memory_bytes = 0;  // highest so far: of the device, or of the process on a CPU
  std::optional<Evaluation> validation;
};

struct Observer {
  std::function<void(const StepReport&)> on_step = [](const StepReport&) {};
  std::function<bool()> should_stop = [] { return false; };
  std::function<void(const std::string&)> notice = [](const std::string&) {};  // lines a person should read once
};

struct Resume {
  bool newest = false;          // the run's newest checkpoint
  std::string checkpoint = {};  // or this one
};

struct TrainResult {
  bool is_complete = false;  // false: should_stop() said so, and the run was saved
  int64_t steps = 0, skipped_steps = 0, tokens = 0;
  double loss = 0;
  std::optional<Evaluation> validation;
  std::string exported;  // where the model, or the adapter alone, was written; empty unless complete
};

// Throws UsageError and DataError as its parts do; WriteError when the disk is full, naming the last whole checkpoint
// and how to go on from it.
TrainResult train(const TrainConfig& config, const Resume& resume, const Observer& observer);

}  // namespace sparsek::train
