// GPT-2's byte alphabet: every byte written as a printable character, so that vocabularies are plain text.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sparsek {

class ByteAlphabet {
 public:
  ByteAlphabet();
  std::string_view text(uint8_t byte) const { return texts_[byte]; }  // UTF-8 of the byte's character
  // Appends the bytes that `text` stands for; false, with `out` as it was, when a character is no byte's.
  bool append_bytes(std::string_view text, std::string& out) const;

 private:
  static constexpr size_t kNumCharacters = 0x144;
  std::array<std::string, 256> texts_;
  std::array<int16_t, kNumCharacters> bytes_;  // by code point, -1 for none
};

}  // namespace sparsek
