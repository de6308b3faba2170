#include "data/normaliser.h"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "data/utf8.h"

namespace sparsek {
namespace {

// Marks after one character that are looked at together. Unicode's own limit for streams is 30 marks, and utf8proc
// takes quadratic time to put them in order.
constexpr size_t kMaxMarkBytes = 1024;

// Characters that are their own normal form and never combine with a character before them: Latin, the common
// Cyrillic, kana, ideographs and Hangul syllables.
bool is_plain(uint32_t c) {
  return c < 0x300 || (c >= 0x400 && c < 0x483) || (c >= 0x3041 && c <= 0x3096) || (c >= 0x30a1 && c <= 0x30fa) ||
         (c >= 0x3400 && c <= 0x9fff) || (c >= 0xac00 && c <= 0xd7a3);
}

// Characters that may change but do not depend on what stands before them: all but marks and Hangul letters.
bool starts_anew(uint32_t c) {
  if (is_plain(c)) return true;
  if (c >= 0x1100 && c <= 0x11ff) return false;
  const utf8proc_property_t* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(c));
  return property->combining_class == 0 && property->category != UTF8PROC_CATEGORY_MN &&
         property->category != UTF8PROC_CATEGORY_MC && property->category != UTF8PROC_CATEGORY_ME;
}

void append_nfc(std::string_view text, std::string& out) {
  if (text.empty()) return;
  // NOLINTNEXTLINE(clang-analyzer-optin.core.EnumCastOutOfRange): the enum's values are flags to be combined
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                               static_cast<utf8proc_ssize_t>(text.size()), &result, kOptions);
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  if (length < 0) throw std::bad_alloc();  // the text is valid, so nothing else can have gone wrong
  out.append(reinterpret_cast<const char*>(result), static_cast<size_t>(length));
}

}  // namespace

// Plain characters are copied, except the last before another character, which that one may change; what lies between
// plain characters is utf8proc's.
void NfcNormaliser::push(std::string_view text, std::string& out) {
  held_ += text;
  size_t done = 0;         // what lies before is appended
  size_t last_start = 0;   // of the last character that starts anew
  bool only_plain = true;  // since `done`
  const auto append_until = [&](size_t end) {
    if (only_plain) {
      out.append(held_, done, end - done);
    } else {
      append_nfc(std::string_view(held_).substr(done, end - done), out);
    }
    done = end;
  };
  for (size_t i = 0; i < held_.size();) {
    const CodePoint c = utf8_decode(std::string_view(held_).substr(i));
    if (is_plain(c.value)) {
      if (!only_plain) append_until(i);
      only_plain = true;
      last_start = i;
    } else {
      if (only_plain) append_until(last_start);
      only_plain = false;
      if (starts_anew(c.value)) {
        last_start = i;
      } else if (i - last_start >= kMaxMarkBytes) {
        append_until(i);
        last_start = i;
      }
    }
    i += static_cast<size_t>(c.length);
  }
  append_until(last_start);
  held_.erase(0, done);
}

void NfcNormaliser::finish(std::string& out) {
  append_nfc(held_, out);
  held_.clear();
}

}  // namespace sparsek
