// What a Tokenizer knows, and how its two sources (GGUF metadata, tokenizer.json) describe it before it is checked.
// Private to data/: the tokenizer, its encoder and its loaders.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/bpe.h"
#include "data/pretokenizer.h"
#include "data/tokenizer.h"

namespace sparsek {

// Normal tokens are written in GPT-2's byte alphabet; the others say their text as it is and are found in the text
// before it is split: added ones always, control ones where the caller asks. Unused ones are never found.
enum class TokenKind : uint8_t { kAbsent, kNormal, kAdded, kControl, kUnused };

// A tokenizer as its file describes it. The views point into the file, which outlives the description.
struct TokenizerDescription {
  struct Token {
    std::string_view text;
    TokenKind kind = TokenKind::kAbsent;
  };
  std::string name;  // of the file, for messages
  PretokenizerKind pretokenizer = PretokenizerKind::kGpt2;
  bool has_nfc = false;
  bool ignore_merges = false;  // a piece that is a token needs no merging (Llama 3)
  bool fuse_unknown = false;
  bool add_bos = false;
  std::vector<Token> tokens;  // by id
  std::vector<std::pair<std::string_view, std::string_view>> merges;
  std::optional<TokenId> unknown, bos;
  std::vector<TokenId> end_ids;
  std::optional<std::string> chat_template;
};

struct TokenizerTables {
  struct FixedToken {  // an added or control token
    std::string text;
    TokenId id;
    bool is_control;
  };
  std::string name;
  Pretokenizer pretokenizer{PretokenizerKind::kGpt2};
  bool has_nfc = false;
  bool add_bos = false;
  Bpe bpe;
  std::string bytes;               // of all tokens, one after the other
  std::vector<uint32_t> offsets;   // of each id in `bytes`, and the end
  std::vector<bool> is_control;    // by id
  std::vector<FixedToken> fixed;   // the longest first, so that the first match is the longest
  std::vector<bool> fixed_starts;  // by byte: may begin one of `fixed`
  std::unordered_map<std::string_view, TokenId> whole_pieces;  // bytes -> id, filled for ignore_merges only
  std::optional<TokenId> bos;
  std::vector<TokenId> end_ids;
  std::optional<std::string> chat_template;

  // Checks the description and builds the tables. DataError naming the file.
  explicit TokenizerTables(const TokenizerDescription& description);
  TokenizerTables(const TokenizerTables&) = delete;
  TokenizerTables& operator=(const TokenizerTables&) = delete;

  std::string_view token_bytes(TokenId id) const {
    const auto i = static_cast<size_t>(id);
    if (id < 0 || i + 1 >= offsets.size()) return {};
    return std::string_view(bytes).substr(offsets[i], offsets[i + 1] - offsets[i]);
  }
};

TokenizerDescription describe_gguf_tokenizer(const GgufFile& file);

}  // namespace sparsek
