#include "data/tokenizer.h"

#include <utility>

#include "base/error.h"
#include "base/sha256.h"
#include "data/tokenizer_tables.h"
#include "data/utf8.h"

namespace sparsek {

Tokenizer::Tokenizer(std::unique_ptr<const TokenizerTables> tables) : tables_(std::move(tables)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::from_gguf(const GgufFile& file) {
  return Tokenizer(std::make_unique<const TokenizerTables>(describe_gguf_tokenizer(file)));
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, SpecialTokens special) const {
  std::vector<TokenId> ids;
  Encoder encoder(*this, special);
  encoder.push(text, ids);
  encoder.finish(ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const TokenId> ids) const {
  std::string text;
  for (const TokenId id : ids) text += token_bytes(id);
  return text;
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  return tables_->token_bytes(id);
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(tables_->offsets.size()) - 1;
}

bool Tokenizer::is_special(TokenId id) const {
  return id >= 0 && id < vocab_size() && tables_->is_control[static_cast<size_t>(id)];
}

std::optional<TokenId> Tokenizer::find_special(std::string_view text) const {
  for (const TokenizerTables::FixedToken& token : tables_->fixed) {
    if (token.text == text) return token.id;
  }
  return std::nullopt;
}

std::vector<TokenId> Tokenizer::prefix() const {
  if (!tables_->add_bos || !tables_->bos) return {};
  return {*tables_->bos};
}

std::optional<TokenId> Tokenizer::bos() const {
  return tables_->bos;
}
const std::vector<TokenId>& Tokenizer::end_ids() const {
  return tables_->end_ids;
}
const std::optional<std::string>& Tokenizer::chat_template() const {
  return tables_->chat_template;
}

std::vector<uint8_t> Tokenizer::missing_bytes() const {
  std::vector<uint8_t> missing;
  for (int byte = 0; byte < 256; ++byte) {
    if (tables_->bpe.byte_id(static_cast<uint8_t>(byte)) < 0) missing.push_back(static_cast<uint8_t>(byte));
  }
  return missing;
}

std::string Tokenizer::fingerprint() const {
  Sha256 hash;
  const auto add_number = [&hash](int64_t value) {
    hash.update({reinterpret_cast<const uint8_t*>(&value), sizeof(value)});
  };
  const auto add_text = [&](std::string_view text) {
    add_number(static_cast<int64_t>(text.size()));
    hash.update(text);
  };
  add_text(name(tables_->pretokenizer.kind()));
  add_number(tables_->has_nfc);
  add_number(!tables_->whole_pieces.empty());
  add_number(vocab_size());
  for (TokenId id = 0; id < vocab_size(); ++id) add_text(token_bytes(id));
  for (const TokenizerTables::FixedToken& token : tables_->fixed) {
    add_text(token.text);
    add_number(token.id);
    add_number(token.is_control);
  }
  const Bpe& bpe = tables_->bpe;
  for (int byte = 0; byte < 256; ++byte) add_number(bpe.byte_id(static_cast<uint8_t>(byte)));
  add_number(bpe.unknown().value_or(-1));
  add_number(bpe.fuse_unknown());
  for (const Bpe::Merge& merge : bpe.merges()) {
    for (const TokenId id : {merge.left, merge.right, merge.merged}) add_number(id);
  }
  return hash.hex();
}

void Tokenizer::check_model_vocab(int64_t num_rows, std::string_view model_path) const {
  if (num_rows >= vocab_size()) return;  // more rows than tokens are padding
  throw_data("{}: expected an embedding row for each of the {} tokens of {}, found {} rows; tokenizer and model differ",
             model_path, vocab_size(), tables_->name, num_rows);
}

std::string TextStream::push(TokenId id) {
  held_ += tokenizer_->token_bytes(id);
  const size_t ready = held_.size() - utf8_incomplete_suffix(held_);
  std::string text = held_.substr(0, ready);
  held_.erase(0, ready);
  return text;
}

std::string TextStream::finish() {
  return std::exchange(held_, {});
}

}  // namespace sparsek
