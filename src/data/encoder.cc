// Text to ids as it arrives. Four stages, each of which holds back what later text could still change:
// fixed tokens are cut out; what lies between is cut into valid UTF-8 and stray bytes; valid text is normalised (Qwen);
// and split into pieces, which byte-pair merging turns into ids. A stray byte is a piece of its own.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <utility>

#include "base/error.h"
#include "data/normaliser.h"
#include "data/tokenizer.h"
#include "data/tokenizer_tables.h"
#include "data/utf8.h"

namespace sparsek {
namespace {

// A longer piece is cut here, or one endless word would have to be held whole. No written text comes near it.
constexpr size_t kMaxPieceBytes = size_t{1} << 20;
constexpr size_t kSliceBytes = size_t{1} << 16;

// The ids of short pieces seen before. Direct-mapped: a new piece takes the place of an old one.
class WordCache {
 public:
  struct Entry {
    static constexpr size_t kMaxBytes = 24;
    static constexpr size_t kMaxIds = 9;
    uint8_t num_bytes = 0;
    uint8_t num_ids = 0;
    std::array<char, kMaxBytes> bytes;
    std::array<TokenId, kMaxIds> ids;
  };
  // The entry of this piece's hash, whoever it belongs to.
  Entry& slot(std::string_view piece) {
    if (entries_.empty()) entries_.resize(size_t{1} << 12);
    return entries_[std::hash<std::string_view>{}(piece) & (entries_.size() - 1)];
  }
  static bool holds(const Entry& entry, std::string_view piece) {
    return entry.num_bytes == piece.size() && std::memcmp(entry.bytes.data(), piece.data(), piece.size()) == 0;
  }
  static void store(Entry& entry, std::string_view piece, const TokenId* ids, size_t num_ids) {
    if (num_ids > Entry::kMaxIds) return;
    entry.num_bytes = static_cast<uint8_t>(piece.size());
    entry.num_ids = static_cast<uint8_t>(num_ids);
    std::copy(piece.begin(), piece.end(), entry.bytes.begin());
    std::copy(ids, ids + num_ids, entry.ids.begin());
  }

 private:
  std::vector<Entry> entries_;
};

}  // namespace

struct Encoder::State {
  State(const TokenizerTables& tables, SpecialTokens special)
      : tables(tables), special(special), scratch(tables.pretokenizer) {}

  const TokenizerTables& tables;
  SpecialTokens special;
  Pretokenizer::Scratch scratch;
  Bpe::Scratch bpe_scratch;
  WordCache cache;
  NfcNormaliser normaliser;
  std::string raw;         // not searched for fixed tokens yet
  std::string incomplete;  // up to three bytes of a character to be completed
  std::string run;         // valid, normalised text not yet split
  size_t wait_until = 0;   // bytes of `run` before another attempt is worth it

  void search_fixed(TextEnd end, std::vector<TokenId>& out);
  void take_bytes(std::string_view bytes, std::vector<TokenId>& out);
  void take_valid(std::string_view text, std::vector<TokenId>& out);
  void end_run(std::vector<TokenId>& out);
  void end_text(std::vector<TokenId>& out);
  void split_run(TextEnd end, std::vector<TokenId>& out);
  void encode_piece(std::string_view piece, std::vector<TokenId>& out);
};

// Stage 1. The leftmost fixed token wins, the longest of those that begin at the same byte.
void Encoder::State::search_fixed(TextEnd end, std::vector<TokenId>& out) {
  const std::string_view text = raw;
  size_t done = 0;
  size_t at = 0;
  while (at < text.size()) {
    if (!tables.fixed_starts[static_cast<uint8_t>(text[at])]) {
      ++at;
      continue;
    }
    const std::string_view rest = text.substr(at);
    const TokenizerTables::FixedToken* found = nullptr;
    bool is_open = false;  // a longer token may still come
    for (const TokenizerTables::FixedToken& token : tables.fixed) {
      if (token.is_control && special == SpecialTokens::kAsText) continue;
      if (token.text.size() > rest.size()) {
        is_open = is_open || (end == TextEnd::kMayGrow && token.text.starts_with(rest));
      } else if (rest.starts_with(token.text)) {
        found = &token;
        break;
      }
    }
    if (is_open) break;
    if (found == nullptr) {
      ++at;
      continue;
    }
    take_bytes(text.substr(done, at - done), out);
    end_text(out);
    out.push_back(found->id);
    at += found->text.size();
    done = at;
  }
  take_bytes(text.substr(done, at - done), out);
  raw.erase(0, at);
}

// Stage 2.
void Encoder::State::take_bytes(std::string_view bytes, std::vector<TokenId>& out) {
  while (!incomplete.empty() && !bytes.empty()) {  // complete, or give up, the character that the last chunk broke off
    incomplete += bytes[0];
    bytes.remove_prefix(1);
    const Utf8Step step = utf8_step(incomplete);
    if (step.kind == Utf8Kind::kIncomplete) continue;
    // After a stray byte the rest is looked at anew: it may begin another character.
    const std::string pending = std::exchange(incomplete, {});
    if (step.kind == Utf8Kind::kCharacter) {
      take_valid(pending, out);
    } else {
      end_run(out);
      encode_piece(std::string_view(pending).substr(0, 1), out);
      take_bytes(std::string_view(pending).substr(1), out);
    }
  }
  while (!bytes.empty()) {
    const size_t valid = utf8_valid_prefix(bytes);
    if (valid > 0) take_valid(bytes.substr(0, valid), out);
    bytes.remove_prefix(valid);
    if (bytes.empty()) break;
    if (utf8_step(bytes).kind == Utf8Kind::kIncomplete) {
      incomplete = bytes;
      break;
    }
    end_run(out);
    encode_piece(bytes.substr(0, 1), out);
    bytes.remove_prefix(1);
  }
}

// Stage 3.
void Encoder::State::take_valid(std::string_view text, std::vector<TokenId>& out) {
  if (tables.has_nfc) {
    normaliser.push(text, run);
  } else {
    run += text;
  }
  split_run(TextEnd::kMayGrow, out);
}

// Ends a stretch of valid text: what follows is a stray byte, a fixed token or nothing.
void Encoder::State::end_run(std::vector<TokenId>& out) {
  if (tables.has_nfc) normaliser.finish(run);
  split_run(TextEnd::kFinal, out);
}

void Encoder::State::end_text(std::vector<TokenId>& out) {
  end_run(out);
  for (const char byte : std::exchange(incomplete, {})) encode_piece({&byte, 1}, out);
}

// Stage 4. A piece is decided within kMaxPieceBytes of text from its own begin, so the cuts depend on the text alone.
void Encoder::State::split_run(TextEnd end, std::vector<TokenId>& out) {
  if (end == TextEnd::kMayGrow && run.size() < std::min(wait_until, kMaxPieceBytes)) return;
  wait_until = 0;
  size_t done = 0;
  while (done < run.size()) {
    std::string_view text = std::string_view(run).substr(done);
    TextEnd text_end = end;
    if (text.size() >= kMaxPieceBytes) {
      size_t cut = kMaxPieceBytes;
      while (cut < text.size() && (static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) --cut;
      text = text.substr(0, cut);
      text_end = TextEnd::kFinal;
    }
    const auto length = tables.pretokenizer.piece_length(text, text_end, scratch);
    if (!length) {
      wait_until = 2 * text.size();  // looked at again when it has doubled, so chunks of one byte stay linear
      break;
    }
    encode_piece(text.substr(0, *length), out);
    done += *length;
  }
  run.erase(0, done);
}

void Encoder::State::encode_piece(std::string_view piece, std::vector<TokenId>& out) {
  if (!tables.whole_pieces.empty()) {
    if (const auto it = tables.whole_pieces.find(piece); it != tables.whole_pieces.end()) {
      out.push_back(it->second);
      return;
    }
  }
  if (piece.size() > WordCache::Entry::kMaxBytes) {
    tables.bpe.encode(piece, out, bpe_scratch);
    return;
  }
  WordCache::Entry& entry = cache.slot(piece);
  if (WordCache::holds(entry, piece)) {
    out.insert(out.end(), entry.ids.begin(), entry.ids.begin() + entry.num_ids);
    return;
  }
  const size_t before = out.size();
  tables.bpe.encode(piece, out, bpe_scratch);
  WordCache::store(entry, piece, out.data() + before, out.size() - before);
}

Encoder::Encoder(const Tokenizer& tokenizer, SpecialTokens special)
    : state_(std::make_unique<State>(tokenizer.tables(), special)) {}
Encoder::~Encoder() = default;
Encoder::Encoder(Encoder&&) noexcept = default;
Encoder& Encoder::operator=(Encoder&&) noexcept = default;

void Encoder::push(std::string_view chunk, std::vector<TokenId>& out) {
  while (!chunk.empty()) {
    const size_t size = std::min(chunk.size(), kSliceBytes);
    state_->raw += chunk.substr(0, size);
    chunk.remove_prefix(size);
    state_->search_fixed(TextEnd::kMayGrow, out);
  }
}

void Encoder::finish(std::vector<TokenId>& out) {
  state_->search_fixed(TextEnd::kFinal, out);
  state_->end_text(out);
}

std::string Encoder::save() const {
  std::string saved;
  for (const std::string_view held : {std::string_view(state_->raw), std::string_view(state_->incomplete),
                                      std::string_view(state_->run), std::string_view(state_->normaliser.held())}) {
    const auto size = static_cast<uint32_t>(held.size());
    saved.append(reinterpret_cast<const char*>(&size), sizeof(size));
    saved += held;
  }
  return saved;
}

void Encoder::restore(std::string_view saved) {
  std::string held[4];
  for (std::string& text : held) {
    uint32_t size = 0;
    const bool has_size = saved.size() >= sizeof(size);
    if (has_size) std::memcpy(&size, saved.data(), sizeof(size));
    if (!has_size || saved.size() - sizeof(size) < size) throw_data("expected a saved encoder, found a damaged one");
    text = saved.substr(sizeof(size), size);
    saved.remove_prefix(sizeof(size) + size);
  }
  // The last two are taken as valid UTF-8 by all that follows.
  const bool is_text = utf8_valid_prefix(held[2]) == held[2].size() && utf8_valid_prefix(held[3]) == held[3].size();
  if (!saved.empty() || !is_text) throw_data("expected a saved encoder, found a damaged one");
  state_->raw = std::move(held[0]);
  state_->incomplete = std::move(held[1]);
  state_->run = std::move(held[2]);
  state_->normaliser = NfcNormaliser(std::move(held[3]));
  state_->wait_until = 0;
}

}  // namespace sparsek
