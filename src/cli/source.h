// Opening what a model file holds, and text as a stream of tokens.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "data/text_reader.h"
#include "data/tokenizer.h"
#include "model/transformer.h"

namespace sparsek::cli {

Tokenizer open_tokenizer(const std::string& model_path);
// What --model names where only its tokenizer is wanted; a tokenizer.json serves too.
Tokenizer open_tokenizer_file(const std::string& model);
// What the configuration asks for, with the scorer it names; else the adapter that comes with the model, else
// window_mass. A slope is an untrained scorer's, so that one alone asks for window_mass.
model::AttentionRequest attention_request(const ModelConfig& config);
// Sets the number of threads, loads the model, prints its notices to stderr. expected_tokens: what the run will read
// and write in all, where that is known; documents: how many states it will hold at a time.
model::Transformer open_model(const ModelConfig& config, const std::string& model_path,
                              std::optional<int64_t> expected_tokens, int64_t documents = 1);
// The chunk that the configuration asks for (UsageError if that is none), or the default. On a GPU the host launches
// some hundred kernels a layer and chunk of SparseK attention, however long the chunk is: long ones keep it ahead of
// the GPU. The other kinds' masks grow with chunk times context.
int64_t tokens_at_once(const ModelConfig& config);
// What a progress line says while a prompt is read: "reading", on a GPU "reading on cuda:0".
std::string reading_on(const model::Transformer& model);
at::ScalarType parse_dtype(const std::string& text);
void set_threads(int64_t threads);

// The tokens of a text file, read and encoded as they are asked for.
class FileTokens {
 public:
  FileTokens(const Tokenizer& tokenizer, const std::string& path);
  // Appends up to `wanted` ids; appends nothing at the end.
  void read(int64_t wanted, std::vector<int32_t>& ids);
  // Tokens of the whole file, extrapolated from what was read; nothing for streams and before anything was read.
  std::optional<int64_t> estimated_total() const;
  // What to plan with before anything was asked for: the same and a little more, or a guess that is slightly low would
  // be a cache that is allocated twice. Reads the first piece of a file, nothing of a stream.
  std::optional<int64_t> expected_total();

 private:
  void encode_next();  // the next piece into ready_, which was used up
  TextReader reader_;
  Encoder encoder_;
  std::vector<int32_t> ready_;
  size_t next_ = 0;
  int64_t given_ = 0;
  bool ended_ = false;
};

}  // namespace sparsek::cli
