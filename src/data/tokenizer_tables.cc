#include "data/tokenizer_tables.h"

#include <algorithm>
#include <unordered_set>

#include "base/error.h"
#include "data/byte_alphabet.h"
#include "data/quote.h"

namespace sparsek {

TokenizerTables::TokenizerTables(const TokenizerDescription& description)
    : name(description.name),
      pretokenizer(description.pretokenizer),
      has_nfc(description.has_nfc),
      add_bos(description.add_bos),
      bos(description.bos),
      end_ids(description.end_ids),
      chat_template(description.chat_template) {
  const auto num_tokens = static_cast<TokenId>(description.tokens.size());
  if (num_tokens == 0) throw_data("{}: expected a vocabulary, found no tokens", name);
  const auto check_id = [&](TokenId id, const char* what) {
    if (id < 0 || id >= num_tokens) {
      throw_data("{}: {}: expected an id below {}, the size of the vocabulary, found {}", name, what, num_tokens, id);
    }
  };
  if (bos) check_id(*bos, "the BOS token");
  if (description.unknown) check_id(*description.unknown, "the unknown token");
  for (const TokenId id : end_ids) check_id(id, "an end token");
  std::sort(end_ids.begin(), end_ids.end());
  end_ids.erase(std::unique(end_ids.begin(), end_ids.end()), end_ids.end());
  if (add_bos && !bos) throw_data("{}: expected a BOS token, which the tokenizer says it adds, found none", name);

  const ByteAlphabet alphabet;
  std::unordered_map<std::string_view, TokenId> normal_ids;  // by text in the byte alphabet
  normal_ids.reserve(description.tokens.size());
  offsets.reserve(description.tokens.size() + 1);
  is_control.resize(description.tokens.size());
  offsets.push_back(0);
  for (TokenId id = 0; id < num_tokens; ++id) {
    const auto& token = description.tokens[static_cast<size_t>(id)];
    if (token.kind == TokenKind::kNormal) {
      if (!alphabet.append_bytes(token.text, bytes)) bytes += token.text;
      normal_ids.emplace(token.text, id);
    } else if (token.kind != TokenKind::kAbsent) {
      bytes += token.text;
      if (token.kind != TokenKind::kUnused && !token.text.empty()) {
        fixed.push_back({std::string(token.text), id, token.kind == TokenKind::kControl});
      }
    }
    is_control[static_cast<size_t>(id)] = token.kind == TokenKind::kControl;
    if (bytes.size() > UINT32_MAX) throw_data("{}: expected at most 4 GiB of token text", name);
    offsets.push_back(static_cast<uint32_t>(bytes.size()));
  }
  std::sort(fixed.begin(), fixed.end(), [](const FixedToken& a, const FixedToken& b) {
    return a.text.size() != b.text.size() ? a.text.size() > b.text.size() : a.id < b.id;
  });
  fixed_starts.resize(256);
  for (const FixedToken& token : fixed) fixed_starts[static_cast<uint8_t>(token.text[0])] = true;

  std::array<TokenId, 256> byte_ids{};
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = normal_ids.find(alphabet.text(static_cast<uint8_t>(byte)));
    byte_ids[static_cast<size_t>(byte)] = it == normal_ids.end() ? -1 : it->second;
  }
  if (std::all_of(byte_ids.begin(), byte_ids.end(), [](TokenId id) { return id < 0; })) {
    throw_data("{}: expected a byte-level vocabulary, found no token of a single byte", name);
  }

  std::vector<Bpe::Merge> merges;
  merges.reserve(description.merges.size());
  std::unordered_set<uint64_t> seen;
  seen.reserve(description.merges.size());
  std::string merged;
  for (const auto& [left, right] : description.merges) {
    merged.assign(left).append(right);
    Bpe::Merge merge{-1, -1, -1};
    for (const auto& [text, id] : {std::pair(left, &merge.left), std::pair(right, &merge.right),
                                   std::pair(std::string_view(merged), &merge.merged)}) {
      const auto it = normal_ids.find(text);
      if (it == normal_ids.end()) {
        throw_data("{}: merge {} ({} + {}): expected three tokens of the vocabulary, found no {}", name, merges.size(),
                   in_quotes(left), in_quotes(right), in_quotes(text));
      }
      *id = it->second;
    }
    if (!seen.insert((uint64_t{static_cast<uint32_t>(merge.left)} << 32) | static_cast<uint32_t>(merge.right)).second) {
      throw_data("{}: merge {} ({} + {}) appears twice", name, merges.size(), in_quotes(left), in_quotes(right));
    }
    merges.push_back(merge);
  }
  bpe = Bpe(byte_ids, std::move(merges), description.unknown, description.fuse_unknown);

  if (description.ignore_merges) {
    whole_pieces.reserve(normal_ids.size());
    for (const auto& [text, id] : normal_ids) whole_pieces.emplace(token_bytes(id), id);
  }
}

}  // namespace sparsek
