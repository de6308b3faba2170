#include "data/utf8.h"

#include <cstring>

namespace sparsek {
namespace {

bool is_continuation(unsigned char byte) {
  return (byte & 0xc0) == 0x80;
}

}  // namespace

Utf8Step utf8_step(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return {Utf8Kind::kCharacter, 1};
  if (first < 0xc2 || first > 0xf4) return {Utf8Kind::kInvalid, 1};
  const int length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) return {Utf8Kind::kIncomplete, i};
    const unsigned char next = byte(static_cast<size_t>(i));
    if (!is_continuation(next)) return {Utf8Kind::kInvalid, 1};
    if (i > 1) continue;
    if (first == 0xe0 && next < 0xa0) return {Utf8Kind::kInvalid, 1};  // overlong
    if (first == 0xed && next > 0x9f) return {Utf8Kind::kInvalid, 1};  // surrogate
    if (first == 0xf0 && next < 0x90) return {Utf8Kind::kInvalid, 1};  // overlong
    if (first == 0xf4 && next > 0x8f) return {Utf8Kind::kInvalid, 1};  // above U+10FFFF
  }
  return {Utf8Kind::kCharacter, length};
}

size_t utf8_valid_prefix(std::string_view text) {
  size_t position = 0;
  while (position < text.size()) {
    uint64_t word = 0;
    if (position + 8 <= text.size()) {
      std::memcpy(&word, text.data() + position, 8);
      if ((word & 0x8080808080808080u) == 0) {
        position += 8;
        continue;
      }
    }
    const Utf8Step step = utf8_step(text.substr(position));
    if (step.kind != Utf8Kind::kCharacter) break;
    position += static_cast<size_t>(step.length);
  }
  return position;
}

size_t utf8_incomplete_suffix(std::string_view text) {
  for (size_t length = 1; length <= 3 && length <= text.size(); ++length) {
    const std::string_view suffix = text.substr(text.size() - length);
    if (is_continuation(static_cast<unsigned char>(suffix[0]))) continue;
    return utf8_step(suffix).kind == Utf8Kind::kIncomplete ? length : 0;
  }
  return 0;
}

CodePoint utf8_decode(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
  if (byte(0) < 0x80) return {byte(0), 1};
  if (byte(0) < 0xe0) return {((byte(0) & 0x1f) << 6) | (byte(1) & 0x3f), 2};
  if (byte(0) < 0xf0) return {((byte(0) & 0x0f) << 12) | ((byte(1) & 0x3f) << 6) | (byte(2) & 0x3f), 3};
  return {((byte(0) & 0x07) << 18) | ((byte(1) & 0x3f) << 12) | ((byte(2) & 0x3f) << 6) | (byte(3) & 0x3f), 4};
}

}  // namespace sparsek
