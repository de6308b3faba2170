// A trained model as files that other programs read: a Hugging Face folder, and the scorers as an adapter beside it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "train/config.h"
#include "train/network.h"
#include "train/trainer.h"

namespace sparsek::train {

// Throws DataError for a model, read from `path`, that export_huggingface could not write: asked before it is trained.
void check_exportable(const model::ModelConfig& model, const std::string& path);
// config.json and model.safetensors in `folder`, LoRA merged; bf16 for networks that compute in bf16, else float32.
void export_huggingface(const Network& network, const std::string& folder);
// The scorers with the attention they were trained for (model/adapter.h). Sparsek networks only.
void export_adapter(const Network& network, const TrainConfig& config, const std::string& path);

// The base's tokenizer beside them, so that programs read text with the folder: a Hugging Face base's files as they
// are, a GGUF file's written anew. Throws DataError where the base has none that data/tokenizer.h reads.
void export_tokenizer(const std::string& base, const std::string& folder);

// README.md for people: what was trained, on what, and what it measured.
struct CardFacts {
  int64_t steps = 0, tokens = 0, skipped_steps = 0;
  std::optional<Evaluation> validation;
  std::string tokenizer;  // where the folder's is from, or why there is none; empty: nothing is said
};
void export_card(const Network& network, const TrainConfig& config, const CardFacts& facts, const std::string& path);

}  // namespace sparsek::train
