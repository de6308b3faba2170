#include "data/normaliser.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "data/utf8.h"

namespace sparsek {
namespace {

constexpr size_t kMaxHeldBytes = size_t{1} << 16;

// Characters that are their own normal form and never combine with a character before them: Latin, the common
// Cyrillic, kana, ideographs and Hangul syllables. Others are left to utf8proc.
bool is_boundary(uint32_t c) {
  return c < 0x300 || (c >= 0x400 && c < 0x483) || (c >= 0x3041 && c <= 0x3096) || (c >= 0x30a1 && c <= 0x30fa) ||
         (c >= 0x3400 && c <= 0x9fff) || (c >= 0xac00 && c <= 0xd7a3);
}

void append_nfc(std::string_view text, std::string& out) {
  if (text.empty()) return;
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()),
                   &result, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  if (length < 0) throw std::bad_alloc();  // the text is valid, so nothing else can have gone wrong
  out.append(reinterpret_cast<const char*>(result), static_cast<size_t>(length));
}

}  // namespace

void NfcNormaliser::push(std::string_view text, std::string& out) {
  held_ += text;
  // Characters up to `done` are appended. A stretch of boundary characters is its own normal form except for its last
  // one, which the next character may change; from there to the next boundary utf8proc decides.
  size_t done = 0;
  size_t last_boundary = 0;
  bool is_plain = true;  // nothing but boundary characters since `done`
  for (size_t i = 0; i < held_.size();) {
    if (!is_plain && i - done >= kMaxHeldBytes) {
      append_nfc(std::string_view(held_).substr(done, i - done), out);
      done = i;
    }
    const CodePoint c = utf8_decode(held_.data() + i);
    if (is_boundary(c.value)) {
      if (!is_plain) {
        append_nfc(std::string_view(held_).substr(done, i - done), out);
        done = i;
        is_plain = true;
      }
      last_boundary = i;
    } else if (is_plain) {
      out.append(held_, done, last_boundary - done);
      done = last_boundary;
      is_plain = false;
    }
    i += static_cast<size_t>(c.length);
  }
  if (is_plain) {
    out.append(held_, done, last_boundary - done);
    done = last_boundary;
  }
  held_.erase(0, done);
}

void NfcNormaliser::finish(std::string& out) {
  append_nfc(held_, out);
  held_.clear();
}

}  // namespace sparsek
