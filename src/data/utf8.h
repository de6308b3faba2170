// UTF-8 by hand: which bytes form a character, and where a stream of bytes may be cut.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sparsek {

enum class Utf8Kind { kCharacter, kInvalid, kIncomplete };

struct Utf8Step {
  Utf8Kind kind;
  int length;  // bytes of a character; 1 for an invalid byte; the bytes left for an incomplete character
};

// What `text`, which must not be empty, begins with. Incomplete: the text ends inside what may become a character.
// Surrogates, overlong forms and values above U+10FFFF are invalid.
Utf8Step utf8_step(std::string_view text);

// Length of the longest prefix of whole valid characters.
size_t utf8_valid_prefix(std::string_view text);

// Bytes at the end of `text` that may be the start of a character still to be completed: 0 to 3.
size_t utf8_incomplete_suffix(std::string_view text);

// The code point of the valid character that `text` begins with, and its length.
struct CodePoint {
  uint32_t value;
  int length;
};
CodePoint utf8_decode(std::string_view text);

}  // namespace sparsek
