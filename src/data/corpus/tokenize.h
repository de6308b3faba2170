// A corpus to token shards, by several threads, in bounded memory.
//
// The bytes written depend on the inputs and options alone: not on the number of threads, and not on how often the run
// was ended and begun again. docs/data.md has the format and the guarantees.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "data/corpus/document_reader.h"
#include "data/corpus/inputs.h"
#include "data/tokenizer.h"

namespace sparsek {

struct TokenizeOptions {
  InputOptions inputs;
  DocumentOptions documents;
  std::string out;                   // folder: new, empty, or one of an earlier run of the same work
  std::optional<TokenId> end_token;  // written after each document
  SpecialTokens special = SpecialTokens::kAsText;
  int64_t shard_bytes = int64_t{128} << 20;  // text a shard holds
  int64_t threads = 1;
};

struct TokenizeTotals {
  int64_t tokens = 0, documents = 0, empty_documents = 0, skipped_lines = 0, text_bytes = 0;
  int64_t shards = 0, input_files = 0, input_bytes = 0;
};

struct TokenizeProgress {
  int64_t tokens = 0;                             // of this run
  int64_t input_bytes = 0, input_bytes_left = 0;  // read by this run, and what it has still to read
};

struct TokenizeResult {
  bool is_complete = false;                    // false: `go_on` said no
  bool was_complete = false;                   // an earlier run did it all
  int64_t resumed_shards = 0;                  // found finished
  int64_t run_tokens = 0, run_text_bytes = 0;  // of this run
  TokenizeTotals totals{};                     // when complete
};

// The token that ends documents: `<|endoftext|>` or `<|end_of_text|>`, whichever the tokenizer has, or none.
std::optional<TokenId> default_end_token(const Tokenizer& tokenizer);

// `go_on` is asked ten times a second, by the calling thread. Throws DataError for a corpus that cannot be used and
// WriteError for a disk that is full; shards that are finished stay, and the same call goes on after them.
TokenizeResult tokenize_corpus(const Tokenizer& tokenizer, const TokenizeOptions& options,
                               const std::function<bool(const TokenizeProgress&)>& go_on);

}  // namespace sparsek
