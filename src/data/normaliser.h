// Unicode normal form C for a text that arrives in pieces (the Qwen tokenizers want it).
//
// Text is cut only before characters that never combine with what stands before them, so the result is that of
// normalising the whole text. More than 1 KiB of marks on one character is cut where it is.
#pragma once
#include <string>
#include <string_view>
#include <utility>

namespace sparsek {

class NfcNormaliser {
 public:
  NfcNormaliser() = default;
  explicit NfcNormaliser(std::string held) : held_(std::move(held)) {}  // goes on where one with this held() stood
  const std::string& held() const { return held_; }

  // Appends to `out` what is certain of the text so far. `text` is valid UTF-8, cut between characters.
  void push(std::string_view text, std::string& out);
  void finish(std::string& out);  // appends the rest

 private:
  std::string held_;
};

}  // namespace sparsek
