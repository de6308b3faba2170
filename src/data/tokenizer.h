// Byte-level BPE tokenizer: text to token ids and back, from GGUF metadata or a Hugging Face tokenizer.json.
//
// Any bytes are accepted: text that is not UTF-8 is encoded byte by byte, and decoding gives the same bytes back (a
// vocabulary may lack some bytes, see missing_bytes()). A Tokenizer is immutable after loading and may be shared by
// threads; Encoder and TextStream hold the state of one stream each. No method adds BOS: see prefix().
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sparsek {

class GgufFile;
class HfCheckpoint;
struct TokenizerTables;  // data/tokenizer_tables.h

using TokenId = int32_t;

// What text such as "<|im_start|>" means in encode(): nine ordinary pieces of text, or the special token.
enum class SpecialTokens { kAsText, kParse };

class Tokenizer {
 public:
  static Tokenizer from_gguf(const GgufFile& file);
  static Tokenizer from_hf(const HfCheckpoint& checkpoint);
  // `tokenizer_config` is the text of tokenizer_config.json, may be empty; `name` stands for the file in messages.
  static Tokenizer from_json(std::string_view tokenizer_json, std::string_view tokenizer_config, std::string name);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  std::vector<TokenId> encode(std::string_view text, SpecialTokens special) const;
  std::string decode(std::span<const TokenId> ids) const;
  std::string_view token_bytes(TokenId id) const;  // what one id decodes to; empty for an id without a token

  int64_t vocab_size() const;         // ids are below this
  bool is_special(TokenId id) const;  // control tokens, which a reader of the output is not shown
  std::optional<TokenId> find_special(std::string_view text) const;
  std::vector<TokenId> prefix() const;  // what a document starts with: {bos} if the tokenizer adds it, else nothing
  std::optional<TokenId> bos() const;
  const std::vector<TokenId>& end_ids() const;  // ids that end a generated text, ascending
  const std::optional<std::string>& chat_template() const;
  std::vector<uint8_t> missing_bytes() const;  // bytes that no token stands for; encode() drops them
  // SHA-256 of what decides the ids of a text: tokens, merges, splitting. The same for a GGUF file and a tokenizer.json
  // of one tokenizer; BOS, end tokens and chat template do not count.
  std::string fingerprint() const;

  // Throws DataError when an id of this tokenizer has no row in an embedding table of `num_rows` rows.
  void check_model_vocab(int64_t num_rows, std::string_view model_path) const;

  const TokenizerTables& tables() const { return *tables_; }

 private:
  explicit Tokenizer(std::unique_ptr<const TokenizerTables> tables);
  std::unique_ptr<const TokenizerTables> tables_;
};

// Encodes a text that arrives in chunks, in memory that does not grow with it; the ids are those of encoding the whole
// text at once, wherever the chunks are cut.
class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, SpecialTokens special);  // the tokenizer must outlive it
  ~Encoder();
  Encoder(Encoder&&) noexcept;
  Encoder& operator=(Encoder&&) noexcept;

  void push(std::string_view chunk, std::vector<TokenId>& out);  // appends the ids that are certain by now
  void finish(std::vector<TokenId>& out);                        // appends the rest; the encoder is then as new

  // What it holds back, as bytes, at most some MiB: an encoder of the same tokenizer that restores them goes on where
  // this one stands. Throws DataError for bytes that save() does not write.
  std::string save() const;
  void restore(std::string_view saved);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Turns ids into text as they come: holds back bytes that may be the start of a UTF-8 sequence still to be completed.
// Bytes that can never become UTF-8 pass through unchanged.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}  // the tokenizer must outlive it
  std::string push(TokenId id);
  std::string finish();  // what was held back

 private:
  const Tokenizer* tokenizer_;
  std::string held_;
};

}  // namespace sparsek
