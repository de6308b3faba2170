#include "data/byte_alphabet.h"

#include "data/utf8.h"

namespace sparsek {

ByteAlphabet::ByteAlphabet() {
  bytes_.fill(-1);
  uint32_t next = 0x100;  // bytes without a printable character of their own get the ones from here on
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool is_printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
    const uint32_t c = is_printable ? byte : next++;
    bytes_[c] = static_cast<int16_t>(byte);
    if (c < 0x80) {
      texts_[byte] = static_cast<char>(c);
    } else {
      texts_[byte] = {static_cast<char>(0xc0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3f))};
    }
  }
}

bool ByteAlphabet::append_bytes(std::string_view text, std::string& out) const {
  const size_t size_before = out.size();
  for (size_t i = 0; i < text.size();) {
    const Utf8Step step = utf8_step(text.substr(i));
    const uint32_t c = step.kind == Utf8Kind::kCharacter ? utf8_decode(text.substr(i)).value : kNumCharacters;
    if (c >= kNumCharacters || bytes_[c] < 0) {
      out.resize(size_before);
      return false;
    }
    out += static_cast<char>(bytes_[c]);
    i += static_cast<size_t>(step.length);
  }
  return true;
}

}  // namespace sparsek
