// What one training run is: every number of it, with its default. A TOML file and key=value overrides fill it in
// (load_config); config_text prints it back as a file that gives the same run.
//
// A key is declared three times: here, in keys() (config.cc) with its meaning, and where it is used. Checks that need
// no file are in check_config.
#pragma once
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "model/attention_config.h"

namespace sparsek::train {

struct RunOptions {
  std::string folder = "run";
  int64_t steps = 1000;
  int64_t seed = 1;
  std::string device = "cpu";
  std::string dtype = "bf16";
  int64_t threads = 0;
  int64_t log_every = 10;
};

struct ModelOptions {
  std::string base;
  int64_t vocab_size = 49152, num_layers = 8, dim = 512, ffn_dim = 1408, num_heads = 8, num_kv_heads = 4, head_dim = 64;
  bool tied_embeddings = true;
  double rope_theta = 10000, rms_eps = 1e-5, init_std = 0.02;
};

struct AttentionOptions {
  std::string kind = "sparsek";
  int64_t topk = 512, window_size = 508, num_sinks = 4;
  std::string layers;
  int64_t far_distance = -1;
  int64_t pool_size = -1;
  std::string gate = "soft";
  bool deterministic = false;
};

struct ScorerOptions {
  int64_t hidden = 128;
  bool timestep_norm = true;
  double alpha = 1, slope = 0;
  bool delayed = true, learn_slope = true;
  double largest_slope = -1;
  int64_t lookup_heads = 0;
  double lookup_slope = 0;
  bool cut_gradient = false;
  std::string adapter;
};

struct DataOptions {
  std::string task = "shards";
  std::string train, validation;
  double validation_fraction = 0.01;
  int64_t min_tokens = 2;
  int64_t batch = 1, seqlen = 8192;
  int64_t recall_pairs = 16, recall_keys = 32, recall_values = 32, recall_noise = 32;
  int64_t recall_repeats = 0;
};

struct RecurrentOptions {
  int64_t chunk = 0, bptt_chunks = 1, dense_cache = 1024;
};

struct OptimiserOptions {
  double lr = 3e-4, scorer_lr = 1e-3, scale_lr = -1, min_lr_ratio = 0.1;
  int64_t warmup_steps = 100;
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0;
  int64_t accumulation = 1;
};

struct LossOptions {
  double next_token = 1, kl = 0;
  std::string teacher;
  int64_t rows = 2048;
};

struct TrainableOptions {
  std::string part = "full";
  int64_t lora_rank = 16;
  double lora_alpha = 32;
  bool recompute = true;
};

struct ScheduleOptions {
  int64_t anneal_steps = 0, topk_from = 0, window_from = 0;
};

struct WarmStartOptions {
  int64_t steps = 0;
  double lr = 1e-3;
};

struct ValidationOptions {
  int64_t every = 500, batches = 8;
  int64_t from_position = 0;
};

struct CheckpointOptions {
  int64_t every = 500, keep = 3;
};

struct TrainConfig {
  RunOptions run;
  ModelOptions model;
  AttentionOptions attention;
  ScorerOptions scorer;
  DataOptions data;
  RecurrentOptions recurrent;
  OptimiserOptions optimiser;
  LossOptions loss;
  TrainableOptions trainable;
  ScheduleOptions schedule;
  WarmStartOptions warm_start;
  ValidationOptions validation;
  CheckpointOptions checkpoint;
};

// A key as it is written, "optimiser.lr", with the field it fills.
struct ConfigKey {
  std::string name;
  std::variant<int64_t*, double*, bool*, std::string*> field;
  const char* meaning;
};
std::vector<ConfigKey> keys(TrainConfig& config);

// `path` empty: defaults and overrides alone. Throws UsageError naming file, line and key: an unknown key (with the
// nearest known one), a value of another type; and what check_config finds.
TrainConfig load_config(const std::string& path, const std::vector<std::string>& overrides);
// The same over text; `source` names it in messages.
TrainConfig parse_config(const std::string& text, const std::string& source, const std::vector<std::string>& overrides);
// Throws UsageError naming the key of a value out of range, or of two that do not go together.
void check_config(const TrainConfig& config);
// TOML, every key with its meaning.
std::string config_text(TrainConfig config);

// Of attention.window_size and of the layers': the same for every kind, so that they are compared on the same data.
int64_t largest_window(const AttentionOptions& attention);

// attention.* as the model takes it; far_distance -1 becomes AttentionConfig::default_far_distance().
model::AttentionConfig attention_config(const TrainConfig& config);

}  // namespace sparsek::train
