// The text in one field of a JSON object, taken from a line that arrives in pieces: any length in bounded memory, and
// the whole line checked as JSON (RFC 8259).
//
// Escapes become UTF-8; half a surrogate pair becomes U+FFFD. Bytes that are not UTF-8 pass through. Nesting is
// bounded, and the field may come once only.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace sparsek {

class JsonLine {
 public:
  explicit JsonLine(std::string field) : field_(std::move(field)) {}

  // Takes a piece of the line, without its newline, and appends to `text` what it adds to the field's. Returns what is
  // wrong, if something is: then only reset() may follow.
  std::optional<std::string> push(std::string_view bytes, std::string& text);

  enum class Content { kBlank, kObject };
  struct End {
    Content content = Content::kBlank;   // blank: nothing but white space
    std::optional<std::string> problem;  // the line ends too early, or lacks the field
  };
  End finish() const;
  void reset();  // for the next line

 private:
  enum class State : uint8_t {
    kBegin,     // before the object
    kFirstKey,  // after {
    kKey,       // after a comma in an object
    kColon,
    kValue,
    kFirstValue,  // after [
    kAfterValue,
    kString,
    kEscape,
    kHex,
    kLiteral,
    kNumber,
    kEnd,  // after the object
  };
  // Where in a number: the next byte may be what JSON's grammar lets follow.
  enum class Number : uint8_t { kMinus, kZero, kInteger, kPoint, kFraction, kExponent, kExponentSign, kExponentDigits };
  enum class StringRole : uint8_t { kSkip, kOuterKey, kKey, kText };

  static constexpr int kMaxDepth = 64;

  std::optional<std::string> step(unsigned char c, std::string& text);
  std::optional<std::string> begin_value(unsigned char c);
  bool number_goes_on(unsigned char c);
  bool number_may_end() const;
  void append(std::string_view bytes, std::string& text);
  void append_code_point(uint32_t value, std::string& text);
  void append_unit(std::string& text);  // the \u escape just read
  void end_surrogate(std::string& text);
  void end_string();
  std::string problem(std::string_view expected, unsigned char found) const;
  bool in_object() const { return (containers_ >> (depth_ - 1) & 1) != 0; }

  std::string field_;
  State state_ = State::kBegin;
  Number number_ = Number::kMinus;
  StringRole role_ = StringRole::kSkip;
  int depth_ = 0;
  uint64_t containers_ = 0;  // one bit a level: 1 an object
  int64_t column_ = 0;       // bytes taken
  std::string key_;          // at the outermost level, cut when longer than the field's name
  bool is_field_ = false;    // the value to come is the field's
  bool has_field_ = false;
  const char* literal_ = nullptr;  // what has to follow
  int num_hex_ = 0;
  uint32_t unit_ = 0;  // of UTF-16
  uint32_t high_ = 0;  // a high surrogate whose other half may follow; 0: none
};

}  // namespace sparsek
