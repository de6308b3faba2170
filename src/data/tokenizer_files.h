// A tokenizer as Hugging Face folders keep it, for models that are written as such folders.
#pragma once
#include <string>

#include "data/tokenizer.h"

namespace sparsek {

// The texts of three files. From the first, PyPI's tokenizers gives the ids that this tokenizer gives; from all of them
// beside a model's config.json, Tokenizer::from_hf gives this tokenizer again: fingerprint, BOS, end tokens, template.
struct TokenizerFiles {
  std::string tokenizer;          // tokenizer.json
  std::string tokenizer_config;   // tokenizer_config.json
  std::string generation_config;  // generation_config.json
};
TokenizerFiles huggingface_files(const Tokenizer& tokenizer);

}  // namespace sparsek
