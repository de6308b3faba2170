// Splits text into the pieces that byte-pair merging never crosses: the four regular expressions of the tokenizers
// supported here, compiled by PCRE2's JIT.
#pragma once
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace sparsek {

enum class PretokenizerKind { kGpt2, kSmolLm, kLlama3, kQwen2 };

const char* name(PretokenizerKind kind);
// The kind that GGUF calls tokenizer.ggml.pre.
std::optional<PretokenizerKind> pretokenizer_from_gguf(std::string_view name);
// The kind whose `Split` pattern in a tokenizer.json this is, and its inverse (of kLlama3 and kQwen2, the kinds that
// have one).
std::optional<PretokenizerKind> pretokenizer_from_pattern(std::string_view pattern);
std::string split_pattern(PretokenizerKind kind);

// Whether more text may follow the text at hand.
enum class TextEnd { kMayGrow, kFinal };

class Pretokenizer {
 public:
  explicit Pretokenizer(PretokenizerKind kind);
  ~Pretokenizer();
  Pretokenizer(Pretokenizer&&) noexcept;
  Pretokenizer& operator=(Pretokenizer&&) noexcept;

  PretokenizerKind kind() const { return kind_; }

  // Scratch memory of one thread.
  class Scratch {
   public:
    explicit Scratch(const Pretokenizer& pretokenizer);
    ~Scratch();
    Scratch(Scratch&&) noexcept;
    Scratch& operator=(Scratch&&) noexcept;

   private:
    friend class Pretokenizer;
    struct Data;
    std::unique_ptr<Data> data_;
  };

  // Length of the piece that `text`, valid UTF-8 and not empty, begins with. Nothing when text that follows could
  // still change it (only with kMayGrow).
  std::optional<size_t> piece_length(std::string_view text, TextEnd end, Scratch& scratch) const;

 private:
  struct Code;
  PretokenizerKind kind_;
  std::unique_ptr<Code> code_;
};

}  // namespace sparsek
