#include "train/config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "base/error.h"
#include "base/saturate.h"
#include "data/quote.h"

namespace sparsek::train {
namespace {

constexpr int64_t kMax = int64_t{1} << 40;

void check_range(const char* key, int64_t value, int64_t low, int64_t high = kMax) {
  if (value < low || value > high) throw_field(key, "expected {} to {}, found {}", low, high, value);
}
void check_number(const char* key, double value, double low, double high) {
  if (!(value >= low && value <= high)) throw_field(key, "expected {} to {}, found {}", low, high, value);
}
void check_choice(const char* key, const std::string& value, std::initializer_list<const char*> choices) {
  std::string wanted;
  for (const char* choice : choices) {
    if (value == choice) return;
    wanted += (wanted.empty() ? "" : ", ") + std::string(choice);
  }
  throw_field(key, "expected one of {}, found {}", wanted, in_quotes(value));
}

// That attention sees at once.
int64_t tokens_of_a_row(const TrainConfig& config) {
  return config.recurrent.chunk > 0 ? config.recurrent.chunk : config.data.seqlen;
}

void check_attention(const TrainConfig& config) {
  const AttentionOptions& attention = config.attention;
  check_choice("attention.kind", attention.kind, {"dense", "window", "sparsek"});
  check_choice("attention.gate", attention.gate, {"soft", "hard"});
  check_range("attention.topk", attention.topk, 1, int64_t{1} << 20);
  check_range("attention.window_size", attention.window_size, 1, int64_t{1} << 20);
  check_range("attention.num_sinks", attention.num_sinks, 0, int64_t{1} << 20);
  check_range("attention.far_distance", attention.far_distance, -1);
  check_range("attention.pool_size", attention.pool_size, -1);
  int64_t largest_topk = attention.topk;
  if (!attention.layers.empty()) {
    largest_topk = 0;
    for (const model::LayerBudget& layer : model::parse_budgets("attention.layers", attention.layers)) {
      largest_topk = std::max(largest_topk, layer.topk);
    }
    if (attention.kind == "sparsek" && config.schedule.anneal_steps > 0) {
      throw_field("schedule.anneal_steps", "expected 0 with attention.layers, found {}", config.schedule.anneal_steps);
    }
  }
  if (attention.pool_size > 0 && attention.pool_size <= largest_topk) {
    throw_field("attention.pool_size", "expected -1 (default), 0 (no limit) or more than topk {}, found {}",
                largest_topk, attention.pool_size);
  }
  if (attention.kind != "dense") {
    const model::AttentionConfig used = attention_config(config);
    const int64_t window = used.largest_window(), first_window = config.schedule.window_from;
    if (attention.far_distance > 0 && attention.far_distance < window) {
      throw_field("attention.far_distance",
                  "expected -1 (default), 0 (off) or no less than the largest window {}, found {}", window,
                  attention.far_distance);
    }
    if (used.far_distance > 0 && first_window > used.far_distance) {
      throw_field("schedule.window_from",
                  "expected at most attention.far_distance {}, found {}; give another far_distance, or 0 for none",
                  used.far_distance, first_window);
    }
  }
  const ScorerOptions& scorer = config.scorer;
  check_range("scorer.hidden", scorer.hidden, 0, int64_t{1} << 16);
  check_number("scorer.alpha", scorer.alpha, -1e6, 1e6);
  check_number("scorer.slope", scorer.slope, 0, 1e6);
  check_range("scorer.lookup_heads", scorer.lookup_heads, 0, int64_t{1} << 20);
  check_number("scorer.lookup_slope", scorer.lookup_slope, 0, 1e6);
  if (scorer.largest_slope != -1) {
    check_number("scorer.largest_slope", scorer.largest_slope, 0, 1e6);
    for (const auto& [key, slope] : {std::pair{"scorer.slope", scorer.adapter.empty() ? scorer.slope : 0.0},
                                     {"scorer.lookup_slope", scorer.lookup_heads > 0 ? scorer.lookup_slope : 0.0}}) {
      if (slope > scorer.largest_slope) {
        throw_field(key, "expected at most scorer.largest_slope {}, found {}", scorer.largest_slope, slope);
      }
    }
  }
  constexpr int64_t kShortest = 32;  // a head cannot be told from another by fewer tokens
  const int64_t row = tokens_of_a_row(config);
  if (scorer.lookup_heads > 0 && row < kShortest) {
    throw_field("scorer.lookup_heads", "expected 0 with fewer than {} tokens a row or chunk ({}), found {}", kShortest,
                row, scorer.lookup_heads);
  }
  const ScheduleOptions& schedule = config.schedule;
  check_range("schedule.anneal_steps", schedule.anneal_steps, 0);
  check_range("schedule.topk_from", schedule.topk_from, 0, int64_t{1} << 20);
  check_range("schedule.window_from", schedule.window_from, 0, int64_t{1} << 20);
  if (schedule.anneal_steps == 0 && (schedule.topk_from > 0 || schedule.window_from > 0)) {
    throw_field("schedule.anneal_steps", "expected above 0 with schedule.topk_from or schedule.window_from, found 0");
  }
  if (attention.pool_size > 0 && attention.pool_size <= schedule.topk_from) {
    throw_field("attention.pool_size",
                "expected -1 (default), 0 (no limit) or more than schedule.topk_from {}, found {}", schedule.topk_from,
                attention.pool_size);
  }
  if (schedule.anneal_steps > 0 && config.recurrent.chunk > 0) {
    throw_field("schedule.anneal_steps", "expected 0 with recurrent.chunk: the carried state has one size, found {}",
                schedule.anneal_steps);
  }
}

void check_data(const TrainConfig& config) {
  const DataOptions& data = config.data;
  check_choice("data.task", data.task, {"shards", "recall"});
  check_range("data.batch", data.batch, 1, int64_t{1} << 20);
  check_range("data.seqlen", data.seqlen, 2, int64_t{1} << 30);
  if (data.task == "shards" && data.train.empty()) {
    throw_field("data.train", "expected the folder of token shards (sparsek tokenize makes one), found nothing");
  }
  if (!(data.validation_fraction >= 0 && data.validation_fraction < 1)) {
    throw_field("data.validation_fraction", "expected 0 to below 1, found {}", data.validation_fraction);
  }
  check_range("data.min_tokens", data.min_tokens, 2);
  if (data.task == "recall") {
    check_range("data.recall_pairs", data.recall_pairs, 1);
    check_range("data.recall_keys", data.recall_keys, data.recall_pairs);
    check_range("data.recall_values", data.recall_values, 1);
    check_range("data.recall_noise", data.recall_noise, 1);
    check_range("data.recall_repeats", data.recall_repeats, 0, 16);
    const int64_t shortest = 2 * (2 + data.recall_repeats) * data.recall_pairs + largest_window(config.attention);
    if (data.seqlen < shortest) {
      throw_field("data.seqlen", "expected at least {} (pairs, questions and a window between them), found {}",
                  shortest, data.seqlen);
    }
  }
  const RecurrentOptions& recurrent = config.recurrent;
  check_range("recurrent.chunk", recurrent.chunk, 0, int64_t{1} << 30);
  check_range("recurrent.bptt_chunks", recurrent.bptt_chunks, 1, int64_t{1} << 20);
  check_range("recurrent.dense_cache", recurrent.dense_cache, 1, int64_t{1} << 30);
  constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a batch
  const int64_t row = tokens_of_a_row(config);
  if (data.batch > kMostTokens / row) {
    throw_field("data.batch", "expected at most {} rows of {} tokens, found {}", kMostTokens / row, row, data.batch);
  }
}

void check_optimiser(const TrainConfig& config) {
  const OptimiserOptions& optimiser = config.optimiser;
  check_number("optimiser.lr", optimiser.lr, 0, 1e3);
  check_number("optimiser.scorer_lr", optimiser.scorer_lr, 0, 1e3);
  if (optimiser.scale_lr != -1) check_number("optimiser.scale_lr", optimiser.scale_lr, 0, 1e3);
  check_number("optimiser.min_lr_ratio", optimiser.min_lr_ratio, 0, 1);
  check_range("optimiser.warmup_steps", optimiser.warmup_steps, 0);
  check_number("optimiser.beta1", optimiser.beta1, 0, 0.999999);
  check_number("optimiser.beta2", optimiser.beta2, 0, 0.999999);
  check_number("optimiser.eps", optimiser.eps, 0, 1);
  check_number("optimiser.weight_decay", optimiser.weight_decay, 0, 10);
  check_number("optimiser.clip", optimiser.clip, 0, 1e9);
  check_range("optimiser.accumulation", optimiser.accumulation, 1, int64_t{1} << 20);
  check_number("loss.next_token", config.loss.next_token, 0, 1e6);
  check_number("loss.kl", config.loss.kl, 0, 1e6);
  check_range("loss.rows", config.loss.rows, 1, int64_t{1} << 30);
  if (config.loss.next_token == 0 && config.loss.kl == 0) {
    throw_field("loss.next_token", "expected loss.next_token or loss.kl above 0, found both 0");
  }
  if (!config.loss.teacher.empty() && config.loss.kl == 0) {
    throw_field("loss.teacher", "expected none with loss.kl 0, found {}", in_quotes(config.loss.teacher));
  }
  check_choice("trainable.part", config.trainable.part, {"full", "lora", "scorer"});
  check_range("trainable.lora_rank", config.trainable.lora_rank, 1, 4096);
  check_number("trainable.lora_alpha", config.trainable.lora_alpha, 0, 1e6);
  if (config.model.base.empty()) {
    if (config.trainable.part != "full") {
      throw_field("trainable.part", "expected full without model.base, found {}", in_quotes(config.trainable.part));
    }
    if (config.loss.kl > 0 && config.loss.teacher.empty()) {
      throw_field("loss.kl", "expected 0 without model.base or loss.teacher, found {}", config.loss.kl);
    }
    if (config.warm_start.steps > 0) {
      throw_field("warm_start.steps", "expected 0 without model.base, found {}", config.warm_start.steps);
    }
    if (config.scorer.lookup_heads > 0) {
      throw_field("scorer.lookup_heads", "expected 0 without model.base, found {}", config.scorer.lookup_heads);
    }
  }
  if (config.trainable.part == "scorer" && config.attention.kind != "sparsek") {
    throw_field("trainable.part", "expected attention.kind sparsek for scorer, found {}",
                in_quotes(config.attention.kind));
  }
  if (config.warm_start.steps > 0 && config.attention.kind != "sparsek") {
    throw_field("warm_start.steps", "expected 0 with {} attention, found {}", config.attention.kind,
                config.warm_start.steps);
  }
}

}  // namespace

std::vector<ConfigKey> keys(TrainConfig& c) {
  return {
      {"run.folder", &c.run.folder, "checkpoints and metrics.jsonl go here"},
      {"run.steps", &c.run.steps, "optimiser steps"},
      {"run.seed", &c.run.seed, "of initial weights and of the order of data"},
      {"run.device", &c.run.device, "cpu, cuda or cuda:N"},
      {"run.dtype", &c.run.dtype, "bf16 or f32: of activations and matrix products; trained weights are f32"},
      {"run.threads", &c.run.threads, "CPU threads; 0: one a core"},
      {"run.log_every", &c.run.log_every, "steps between lines of metrics.jsonl"},

      {"model.base", &c.model.base, "GGUF file, Hugging Face folder or smollm2; empty: start from random weights"},
      {"model.vocab_size", &c.model.vocab_size, "without a base, as all of the following"},
      {"model.num_layers", &c.model.num_layers, ""},
      {"model.dim", &c.model.dim, ""},
      {"model.ffn_dim", &c.model.ffn_dim, ""},
      {"model.num_heads", &c.model.num_heads, ""},
      {"model.num_kv_heads", &c.model.num_kv_heads, ""},
      {"model.head_dim", &c.model.head_dim, ""},
      {"model.tied_embeddings", &c.model.tied_embeddings, ""},
      {"model.rope_theta", &c.model.rope_theta, ""},
      {"model.rms_eps", &c.model.rms_eps, ""},
      {"model.init_std", &c.model.init_std, "of random weights; output projections get it / sqrt(2 layers)"},

      {"attention.kind", &c.attention.kind, "dense, window or sparsek"},
      {"attention.topk", &c.attention.topk, "selected keys a query"},
      {"attention.window_size", &c.attention.window_size, "keys visible by recency, the query's own included"},
      {"attention.layers", &c.attention.layers,
       "sparsek: \"topk+window, topk+window, ...\" of each layer instead of the two"},
      {"attention.num_sinks", &c.attention.num_sinks, "first tokens that stay visible"},
      {"attention.far_distance", &c.attention.far_distance,
       "rotary distance of keys outside the window; 0: their own; "
       "-1: sinks + topk + window"},
      {"attention.pool_size", &c.attention.pool_size,
       "candidates that thresholds look at; 0: all; -1: max(4 topk, 1024)"},
      {"attention.gate", &c.attention.gate, "soft, or hard: the straight-through estimator"},
      {"attention.deterministic", &c.attention.deterministic, "the same bits every run, on a GPU too"},

      {"scorer.hidden", &c.scorer.hidden, "width of the scorer's hidden layer; 0: linear"},
      {"scorer.timestep_norm", &c.scorer.timestep_norm, "scores by their running mean and variance (eq. 1)"},
      {"scorer.delayed", &c.scorer.delayed, "alpha y of eq. 1b is part of the score, alpha learned"},
      {"scorer.alpha", &c.scorer.alpha, "initial alpha"},
      {"scorer.slope", &c.scorer.slope, "initial position slope, per 1,024 positions"},
      {"scorer.learn_slope", &c.scorer.learn_slope, "false: the slope stays as it is"},
      {"scorer.largest_slope", &c.scorer.largest_slope,
       "no slope is larger; -1: any. A key that is d older pays at most slope d / 1024"},
      {"scorer.lookup_heads", &c.scorer.lookup_heads,
       "KV heads of the whole model that the dense base looks things up with most: their slope is lookup_slope"},
      {"scorer.lookup_slope", &c.scorer.lookup_slope, "and stays so"},
      {"scorer.cut_gradient", &c.scorer.cut_gradient, "no gradient through scores: the control of an experiment"},
      {"scorer.adapter", &c.scorer.adapter, "start from this adapter's scorers"},

      {"data.task", &c.data.task, "shards, or recall: generated key-value recall across the window"},
      {"data.train", &c.data.train, "folder of token shards"},
      {"data.validation", &c.data.validation, "folder of token shards; empty: the part that data.train sets aside"},
      {"data.validation_fraction", &c.data.validation_fraction, "of data.train's documents, where there is no folder"},
      {"data.min_tokens", &c.data.min_tokens, "shorter documents are left out"},
      {"data.batch", &c.data.batch, "rows of a batch"},
      {"data.seqlen", &c.data.seqlen, "tokens of a row; not used with recurrent.chunk"},
      {"data.recall_pairs", &c.data.recall_pairs, "pairs to remember in a row"},
      {"data.recall_keys", &c.data.recall_keys, "different keys"},
      {"data.recall_values", &c.data.recall_values, "different values"},
      {"data.recall_noise", &c.data.recall_noise, "different tokens between them"},
      {"data.recall_repeats", &c.data.recall_repeats,
       "times that a pair is told again within the window; what a run practises on, not what validation asks"},

      {"recurrent.chunk", &c.recurrent.chunk, "tokens of a chunk; 0: whole rows, nothing carried"},
      {"recurrent.bptt_chunks", &c.recurrent.bptt_chunks, "chunks a step; gradients stop before them"},
      {"recurrent.dense_cache", &c.recurrent.dense_cache, "tokens that dense attention carries"},

      {"optimiser.lr", &c.optimiser.lr, "highest learning rate"},
      {"optimiser.scorer_lr", &c.optimiser.scorer_lr, "of scorers"},
      {"optimiser.scale_lr", &c.optimiser.scale_lr,
       "of scorers' slope, gamma and alpha, in the warm start too; -1: scorer_lr, warm_start.lr"},
      {"optimiser.min_lr_ratio", &c.optimiser.min_lr_ratio, "last rate of the cosine / highest"},
      {"optimiser.warmup_steps", &c.optimiser.warmup_steps, "steps from 0 to the highest"},
      {"optimiser.beta1", &c.optimiser.beta1, ""},
      {"optimiser.beta2", &c.optimiser.beta2, ""},
      {"optimiser.eps", &c.optimiser.eps, ""},
      {"optimiser.weight_decay", &c.optimiser.weight_decay, "of matrices; norms, biases and scorers have none"},
      {"optimiser.clip", &c.optimiser.clip, "largest norm of all gradients; 0: any"},
      {"optimiser.accumulation", &c.optimiser.accumulation, "batches a step"},

      {"loss.next_token", &c.loss.next_token, "weight of the cross-entropy with the next token"},
      {"loss.kl", &c.loss.kl, "weight of KL(teacher || trained model) per token; the teacher has dense attention"},
      {"loss.teacher", &c.loss.teacher, "GGUF file, Hugging Face folder or smollm2; empty: the base as it was"},
      {"loss.rows", &c.loss.rows, "tokens whose logits exist at once"},

      {"trainable.part", &c.trainable.part, "full, lora, or scorer (the base stays as it is)"},
      {"trainable.lora_rank", &c.trainable.lora_rank, ""},
      {"trainable.lora_alpha", &c.trainable.lora_alpha, "an update counts alpha / rank"},
      {"trainable.recompute", &c.trainable.recompute,
       "compute a layer again in the backward pass instead of keeping it"},

      {"schedule.anneal_steps", &c.schedule.anneal_steps, "steps over which topk and window go from .. to attention's"},
      {"schedule.topk_from", &c.schedule.topk_from, "0: attention.topk from the start"},
      {"schedule.window_from", &c.schedule.window_from, "0: attention.window_size from the start"},

      {"warm_start.steps", &c.warm_start.steps, "steps before the run that fit scores to the dense base's attention"},
      {"warm_start.lr", &c.warm_start.lr, ""},

      {"validation.every", &c.validation.every, "steps between validations; 0: none"},
      {"validation.batches", &c.validation.batches, "batches of one"},
      {"validation.from_position", &c.validation.from_position,
       "tokens before this position of their document count for nothing"},
      {"checkpoint.every", &c.checkpoint.every, "steps between checkpoints; 0: at the end alone"},
      {"checkpoint.keep", &c.checkpoint.keep, "checkpoints that stay"},
  };
}

void check_config(const TrainConfig& config) {
  check_range("run.steps", config.run.steps, 0);
  check_range("run.seed", config.run.seed, 0, INT64_MAX);
  check_range("run.threads", config.run.threads, 0, 4096);
  check_range("run.log_every", config.run.log_every, 1);
  check_choice("run.dtype", config.run.dtype, {"bf16", "f32"});
  if (config.run.folder.empty()) throw_field("run.folder", "expected a path, found nothing");
  check_number("model.init_std", config.model.init_std, 0, 10);
  check_attention(config);
  check_data(config);
  check_optimiser(config);
  check_range("warm_start.steps", config.warm_start.steps, 0);
  check_number("warm_start.lr", config.warm_start.lr, 0, 1e3);
  check_range("validation.every", config.validation.every, 0);
  check_range("validation.batches", config.validation.batches, 1);
  check_range("validation.from_position", config.validation.from_position, 0);
  const bool is_recurrent = config.recurrent.chunk > 0;
  const int64_t reach =
      is_recurrent ? saturating_multiply(config.recurrent.chunk, config.validation.batches) : config.data.seqlen;
  if (config.validation.from_position >= reach) {
    throw_field("validation.from_position", "expected less than {} {}, found {}",
                is_recurrent ? "recurrent.chunk times validation.batches," : "data.seqlen", reach,
                config.validation.from_position);
  }
  check_range("checkpoint.every", config.checkpoint.every, 0);
  check_range("checkpoint.keep", config.checkpoint.keep, 1);
}

int64_t largest_window(const AttentionOptions& attention) {
  if (attention.layers.empty()) return attention.window_size;
  return std::max(attention.window_size,
                  model::largest_window(model::parse_budgets("attention.layers", attention.layers)));
}

model::AttentionConfig attention_config(const TrainConfig& config) {
  const AttentionOptions& options = config.attention;
  model::AttentionConfig attention;
  attention.kind = model::parse_attention_kind(options.kind);
  if (attention.kind == model::AttentionKind::kDense) return attention;
  attention.window_size = options.window_size;
  attention.num_sinks = options.num_sinks;
  if (attention.kind == model::AttentionKind::kSparsek) {
    attention.topk = options.topk;
    attention.gate = model::parse_gate(options.gate);
    if (!options.layers.empty()) {
      attention.layers = model::parse_budgets("attention.layers", options.layers);
      const model::LayerBudget mean = model::mean_budget(attention.layers);
      attention.topk = mean.topk;
      attention.window_size = mean.window_size;
    }
    attention.scorer = model::ScorerKind::kAdapter;
    attention.delayed_scores = config.scorer.delayed;
    attention.slope = 0;
  }
  attention.far_distance = options.far_distance >= 0 ? options.far_distance : attention.default_far_distance();
  return attention;
}

}  // namespace sparsek::train
