// The tokenizer that a GGUF file's metadata describes.
#include <set>
#include <string>

#include "base/error.h"
#include "data/gguf.h"
#include "data/quote.h"
#include "data/tokenizer_tables.h"

namespace sparsek {
namespace {

// GGUF's numbers for kinds of tokens.
enum GgufTokenType : int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

TokenKind kind_of(int64_t type, size_t id, const std::string& path) {
  switch (type) {
    case kNormal:
      return TokenKind::kNormal;
    case kUnknown:
    case kControl:
      return TokenKind::kControl;
    case kUserDefined:
      return TokenKind::kAdded;
    case kUnused:
      return TokenKind::kUnused;
    default:
      throw_data("{}: tokenizer.ggml.token_type of token {}: expected 1 to 5, found {}", path, id, type);
  }
}

std::optional<TokenId> find_id(const GgufFile& file, std::string_view key) {
  const auto id = file.find_int(key);
  if (!id || *id == UINT32_MAX || *id == -1) return std::nullopt;  // some writers put "none" so
  if (*id < 0 || *id > INT32_MAX) throw_data("{}: {}: expected a token id, found {}", file.path(), key, *id);
  return static_cast<TokenId>(*id);
}

}  // namespace

TokenizerDescription describe_gguf_tokenizer(const GgufFile& file) {
  const std::string_view model = file.get_string("tokenizer.ggml.model");
  if (model != "gpt2") {
    throw_data(
        "{}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), found {}; other tokenizers are not supported",
        file.path(), in_quotes(model));
  }
  const std::string_view pre = file.find_string("tokenizer.ggml.pre").value_or("");
  const auto pretokenizer = pretokenizer_from_gguf(pre);
  if (!pretokenizer) {
    throw_data("{}: tokenizer.ggml.pre: expected gpt-2, smollm, llama-bpe or qwen2, found {}", file.path(),
               in_quotes(pre));
  }

  TokenizerDescription description;
  description.name = file.path();
  description.pretokenizer = *pretokenizer;
  description.has_nfc = false;  // GGUF tokenizers are defined without a normaliser
  description.ignore_merges = *pretokenizer == PretokenizerKind::kLlama3;
  description.add_bos =
      file.find_bool("tokenizer.ggml.add_bos_token").value_or(*pretokenizer == PretokenizerKind::kLlama3);
  description.bos = find_id(file, "tokenizer.ggml.bos_token_id");

  const auto texts = file.get_strings("tokenizer.ggml.tokens");
  const auto types = file.find_ints("tokenizer.ggml.token_type");
  if (types && types->size() != texts.size()) {
    throw_data("{}: tokenizer.ggml.token_type: expected one for each of {} tokens, found {}", file.path(), texts.size(),
               types->size());
  }
  if (texts.size() > INT32_MAX) throw_data("{}: expected at most 2^31 tokens, found {}", file.path(), texts.size());
  description.tokens.reserve(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    description.tokens.push_back({texts[i], types ? kind_of((*types)[i], i, file.path()) : TokenKind::kNormal});
  }

  const auto merges = file.get_strings("tokenizer.ggml.merges");
  description.merges.reserve(merges.size());
  for (const std::string_view merge : merges) {
    const size_t space = merge.find(' ');
    if (space == merge.npos || space == 0 || space + 1 == merge.size() || merge.find(' ', space + 1) != merge.npos) {
      throw_data("{}: merge {}: expected two tokens with a space between, found {}", file.path(),
                 description.merges.size(), in_quotes(merge));
    }
    description.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }

  for (const char* key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    if (const auto id = find_id(file, key)) description.end_ids.push_back(*id);
  }
  // Files name one end token, while the models they hold end a text or a turn with any of these.
  const std::set<std::string_view> ends = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>",
                                           "<|eom_id|>"};
  for (size_t i = 0; i < description.tokens.size(); ++i) {
    const auto& token = description.tokens[i];
    if (token.kind == TokenKind::kControl && ends.contains(token.text)) {
      description.end_ids.push_back(static_cast<TokenId>(i));
    }
  }
  if (const auto text = file.find_string("tokenizer.chat_template")) description.chat_template = std::string(*text);
  return description;
}

}  // namespace sparsek
