#include "data/corpus/json_line.h"

#include <fmt/format.h>

#include "data/quote.h"

namespace sparsek {
namespace {

constexpr uint32_t kReplacement = 0xfffd;

bool is_blank(unsigned char c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}
bool is_digit(unsigned char c) {
  return c >= '0' && c <= '9';
}
int hex_digit(unsigned char c) {
  if (is_digit(c)) return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string JsonLine::problem(std::string_view expected, unsigned char found) const {
  const char byte = static_cast<char>(found);
  return fmt::format("expected {}, found {} at byte {} of the line", expected, in_quotes({&byte, 1}), column_);
}

void JsonLine::reset() {
  *this = JsonLine(std::move(field_));
}

void JsonLine::append(std::string_view bytes, std::string& text) {
  if (role_ == StringRole::kText) {
    text += bytes;
  } else if (role_ == StringRole::kOuterKey && key_.size() <= field_.size()) {
    key_ += bytes.substr(0, field_.size() + 1 - key_.size());
  }
}

void JsonLine::append_code_point(uint32_t value, std::string& text) {
  char bytes[4];
  size_t size = 0;
  const auto put = [&](uint32_t byte) { bytes[size++] = static_cast<char>(byte); };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xc0 | value >> 6);
    put(0x80 | (value & 0x3f));
  } else if (value < 0x10000) {
    put(0xe0 | value >> 12);
    put(0x80 | (value >> 6 & 0x3f));
    put(0x80 | (value & 0x3f));
  } else {
    put(0xf0 | value >> 18);
    put(0x80 | (value >> 12 & 0x3f));
    put(0x80 | (value >> 6 & 0x3f));
    put(0x80 | (value & 0x3f));
  }
  append({bytes, size}, text);
}

void JsonLine::end_surrogate(std::string& text) {
  if (high_ != 0) append_code_point(kReplacement, text);
  high_ = 0;
}

void JsonLine::append_unit(std::string& text) {
  const bool is_low = unit_ >= 0xdc00 && unit_ < 0xe000;
  if (high_ != 0 && is_low) {
    append_code_point(0x10000 + ((high_ - 0xd800) << 10) + (unit_ - 0xdc00), text);
    high_ = 0;
    return;
  }
  end_surrogate(text);
  if (unit_ >= 0xd800 && unit_ < 0xdc00) {
    high_ = unit_;
  } else {
    append_code_point(is_low ? kReplacement : unit_, text);
  }
}

void JsonLine::end_string() {
  if (role_ == StringRole::kOuterKey) is_field_ = key_ == field_;
  state_ = role_ == StringRole::kOuterKey || role_ == StringRole::kKey ? State::kColon : State::kAfterValue;
}

std::optional<std::string> JsonLine::begin_value(unsigned char c) {
  if (is_field_ && depth_ == 1) {
    if (c != '"') return problem(fmt::format("a string as the value of {}", in_quotes(field_)), c);
    if (has_field_) return fmt::format("expected the field {} once, found it twice", in_quotes(field_));
    has_field_ = true;
  }
  if (c == '"') {
    role_ = is_field_ && depth_ == 1 ? StringRole::kText : StringRole::kSkip;
    state_ = State::kString;
  } else if (c == '{' || c == '[') {
    if (depth_ == kMaxDepth) return fmt::format("expected JSON nested at most {} deep, found more", kMaxDepth);
    containers_ = (containers_ & ~(uint64_t{1} << depth_)) | uint64_t{c == '{'} << depth_;
    ++depth_;
    state_ = c == '{' ? State::kFirstKey : State::kFirstValue;
  } else if (c == '-' || is_digit(c)) {
    number_ = c == '-' ? Number::kMinus : c == '0' ? Number::kZero : Number::kInteger;
    state_ = State::kNumber;
  } else if (c == 't' || c == 'f' || c == 'n') {
    literal_ = c == 't' ? "rue" : c == 'f' ? "alse" : "ull";
    state_ = State::kLiteral;
  } else {
    return problem("a JSON value", c);
  }
  return std::nullopt;
}

bool JsonLine::number_goes_on(unsigned char c) {
  const bool digit = is_digit(c), exponent = c == 'e' || c == 'E';
  switch (number_) {
    case Number::kMinus:
      if (digit) number_ = c == '0' ? Number::kZero : Number::kInteger;
      return digit;
    case Number::kZero:
    case Number::kInteger:
      if (digit) return number_ == Number::kInteger;
      if (c == '.') number_ = Number::kPoint;
      if (exponent) number_ = Number::kExponent;
      return c == '.' || exponent;
    case Number::kPoint:
      if (digit) number_ = Number::kFraction;
      return digit;
    case Number::kFraction:
      if (exponent) number_ = Number::kExponent;
      return digit || exponent;
    case Number::kExponent:
      if (c == '+' || c == '-') number_ = Number::kExponentSign;
      if (digit) number_ = Number::kExponentDigits;
      return digit || c == '+' || c == '-';
    case Number::kExponentSign:
      if (digit) number_ = Number::kExponentDigits;
      return digit;
    case Number::kExponentDigits:
      return digit;
  }
  return false;
}

bool JsonLine::number_may_end() const {
  return number_ == Number::kZero || number_ == Number::kInteger || number_ == Number::kFraction ||
         number_ == Number::kExponentDigits;
}

std::optional<std::string> JsonLine::step(unsigned char c, std::string& text) {
  switch (state_) {
    case State::kString:
      if (c == '\\') {
        state_ = State::kEscape;
      } else if (c == '"') {
        end_surrogate(text);
        end_string();
      } else if (c < 0x20) {
        return problem("an escape for a control character", c);
      } else {
        end_surrogate(text);
        const char byte = static_cast<char>(c);
        append({&byte, 1}, text);
      }
      return std::nullopt;
    case State::kEscape: {
      if (c == 'u') {
        state_ = State::kHex;
        num_hex_ = 0;
        unit_ = 0;
        return std::nullopt;
      }
      static constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
      const size_t at = kNames.find(static_cast<char>(c));
      if (at == kNames.npos) return problem("an escape that JSON has", c);
      end_surrogate(text);
      append(kValues.substr(at, 1), text);
      state_ = State::kString;
      return std::nullopt;
    }
    case State::kHex: {
      const int digit = hex_digit(c);
      if (digit < 0) return problem("four hexadecimal digits", c);
      unit_ = unit_ << 4 | static_cast<uint32_t>(digit);
      if (++num_hex_ == 4) {
        append_unit(text);
        state_ = State::kString;
      }
      return std::nullopt;
    }
    case State::kLiteral:
      if (c != static_cast<unsigned char>(*literal_)) return problem("true, false or null", c);
      if (*++literal_ == '\0') state_ = State::kAfterValue;
      return std::nullopt;
    case State::kNumber:
      if (number_goes_on(c)) return std::nullopt;
      if (!number_may_end()) return problem("the rest of a number", c);
      state_ = State::kAfterValue;
      break;
    default:
      break;
  }
  if (is_blank(c)) return std::nullopt;
  switch (state_) {
    case State::kBegin:
      if (c != '{') return problem("a JSON object", c);
      is_field_ = false;
      return begin_value(c);
    case State::kFirstKey:
    case State::kKey:
      if (c == '"') {
        role_ = depth_ == 1 ? StringRole::kOuterKey : StringRole::kKey;
        key_.clear();
        state_ = State::kString;
        return std::nullopt;
      }
      if (c != '}' || state_ == State::kKey) return problem("the name of a field", c);
      break;  // an empty object
    case State::kColon:
      if (c != ':') return problem("':'", c);
      state_ = State::kValue;
      return std::nullopt;
    case State::kFirstValue:
      if (c == ']') break;  // an empty array
      return begin_value(c);
    case State::kValue:
      return begin_value(c);
    case State::kAfterValue:
      if (c == ',') {
        state_ = in_object() ? State::kKey : State::kValue;
        return std::nullopt;
      }
      if (c != (in_object() ? '}' : ']')) return problem(in_object() ? "',' or '}'" : "',' or ']'", c);
      break;
    default:
      return problem("the end of the line", c);
  }
  --depth_;
  state_ = depth_ == 0 ? State::kEnd : State::kAfterValue;
  return std::nullopt;
}

std::optional<std::string> JsonLine::push(std::string_view bytes, std::string& text) {
  size_t i = 0;
  while (i < bytes.size()) {
    if (state_ == State::kString && high_ == 0) {  // what most bytes are: a run of plain characters
      size_t end = i;
      while (end < bytes.size()) {
        const auto c = static_cast<unsigned char>(bytes[end]);
        if (c == '"' || c == '\\' || c < 0x20) break;
        ++end;
      }
      append(bytes.substr(i, end - i), text);
      column_ += static_cast<int64_t>(end - i);
      i = end;
      if (i == bytes.size()) break;
    }
    ++column_;
    if (auto found = step(static_cast<unsigned char>(bytes[i]), text)) return found;
    ++i;
  }
  return std::nullopt;
}

JsonLine::End JsonLine::finish() const {
  if (state_ == State::kBegin) return {};
  if (state_ != State::kEnd) {
    return {Content::kObject,
            fmt::format("expected the rest of a JSON object, found the end of the line after {} bytes", column_)};
  }
  if (!has_field_) return {Content::kObject, fmt::format("expected the field {}, found none", in_quotes(field_))};
  return {Content::kObject, std::nullopt};
}

}  // namespace sparsek
