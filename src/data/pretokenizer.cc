#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/pretokenizer.h"

#include <pcre2.h>

#include <cassert>
#include <new>
#include <stdexcept>
#include <string>

#include "data/utf8.h"

namespace sparsek {
namespace {

// White space as Unicode defines it. PCRE2's own \s also takes U+180E, which is none since Unicode 6.3.
#define SPARSEK_SPACE "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define SPARSEK_SPACES "[" SPARSEK_SPACE "]+"
#define SPARSEK_NEXT_IS_NO_TEXT "(?![^" SPARSEK_SPACE "])"

constexpr const char* kGpt2Pattern = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPARSEK_SPACE
                                     "\\p{L}\\p{N}]+|" SPARSEK_SPACES SPARSEK_NEXT_IS_NO_TEXT "|" SPARSEK_SPACES;
// Digits are split off one by one first and the GPT-2 pattern sees what lies between them: as one pattern, a digit
// stands alone and spaces before it end as at the end of the text.
constexpr const char* kSmolLmPattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+|\\p{N}| ?[^" SPARSEK_SPACE "\\p{L}\\p{N}]+|" SPARSEK_SPACES "(?![^" SPARSEK_SPACE
    "\\p{N}])|" SPARSEK_SPACES;
#define SPARSEK_WORDS_PATTERN(numbers)                                                       \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers " ?[^" SPARSEK_SPACE \
  "\\p{L}\\p{N}]+[\\r\\n]*|[" SPARSEK_SPACE "]*[\\r\\n]+|" SPARSEK_SPACES SPARSEK_NEXT_IS_NO_TEXT "|" SPARSEK_SPACES
constexpr const char* kLlama3Pattern = SPARSEK_WORDS_PATTERN("\\p{N}{1,3}|");
constexpr const char* kQwen2Pattern = SPARSEK_WORDS_PATTERN("\\p{N}|");

const char* pattern_of(PretokenizerKind kind) {
  switch (kind) {
    case PretokenizerKind::kGpt2:
      return kGpt2Pattern;
    case PretokenizerKind::kSmolLm:
      return kSmolLmPattern;
    case PretokenizerKind::kLlama3:
      return kLlama3Pattern;
    case PretokenizerKind::kQwen2:
      return kQwen2Pattern;
  }
  return "";
}

}  // namespace

const char* name(PretokenizerKind kind) {
  switch (kind) {
    case PretokenizerKind::kGpt2:
      return "gpt-2";
    case PretokenizerKind::kSmolLm:
      return "smollm";
    case PretokenizerKind::kLlama3:
      return "llama-bpe";
    case PretokenizerKind::kQwen2:
      return "qwen2";
  }
  return "?";
}

std::optional<PretokenizerKind> pretokenizer_from_gguf(std::string_view name) {
  for (const auto kind :
       {PretokenizerKind::kGpt2, PretokenizerKind::kSmolLm, PretokenizerKind::kLlama3, PretokenizerKind::kQwen2}) {
    if (name == sparsek::name(kind)) return kind;
  }
  return std::nullopt;
}

std::string split_pattern(PretokenizerKind kind) {
  const std::string numbers = kind == PretokenizerKind::kLlama3 ? "\\p{N}{1,3}" : "\\p{N}";
  return "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" + numbers +
         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
}

std::optional<PretokenizerKind> pretokenizer_from_pattern(std::string_view pattern) {
  for (const auto kind : {PretokenizerKind::kLlama3, PretokenizerKind::kQwen2}) {
    if (pattern == split_pattern(kind)) return kind;
  }
  return std::nullopt;
}

struct Pretokenizer::Code {
  pcre2_code* code = nullptr;
  bool has_jit = false;
  ~Code() { pcre2_code_free(code); }
};

struct Pretokenizer::Scratch::Data {
  pcre2_match_data* match = nullptr;
  pcre2_match_context* context = nullptr;
  pcre2_jit_stack* stack = nullptr;
  ~Data() {
    pcre2_match_data_free(match);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

Pretokenizer::Pretokenizer(PretokenizerKind kind) : kind_(kind), code_(std::make_unique<Code>()) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern_of(kind)), PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, &error, &offset, nullptr);
  if (code_->code == nullptr) {
    throw std::logic_error("pretokenizer pattern: error " + std::to_string(error) + " at " + std::to_string(offset));
  }
  // Without a JIT (some processors, some hardened systems) matching is slower and otherwise the same.
  code_->has_jit = pcre2_jit_compile(code_->code, PCRE2_JIT_COMPLETE | PCRE2_JIT_PARTIAL_HARD) == 0;
}
Pretokenizer::~Pretokenizer() = default;
Pretokenizer::Pretokenizer(Pretokenizer&&) noexcept = default;
Pretokenizer& Pretokenizer::operator=(Pretokenizer&&) noexcept = default;

Pretokenizer::Scratch::Scratch(const Pretokenizer& pretokenizer) : data_(std::make_unique<Data>()) {
  data_->match = pcre2_match_data_create(1, nullptr);
  data_->context = pcre2_match_context_create(nullptr);
  data_->stack = pcre2_jit_stack_create(size_t{32} << 10, size_t{8} << 20, nullptr);
  if (data_->match == nullptr || data_->context == nullptr) throw std::bad_alloc();
  if (data_->stack != nullptr) pcre2_jit_stack_assign(data_->context, nullptr, data_->stack);
}
Pretokenizer::Scratch::~Scratch() = default;
Pretokenizer::Scratch::Scratch(Scratch&&) noexcept = default;
Pretokenizer::Scratch& Pretokenizer::Scratch::operator=(Scratch&&) noexcept = default;

std::optional<size_t> Pretokenizer::piece_length(std::string_view text, TextEnd end, Scratch& scratch) const {
  assert(!text.empty());
  const auto match = code_->has_jit ? pcre2_jit_match : pcre2_match;
  const uint32_t options = PCRE2_NO_UTF_CHECK | (end == TextEnd::kMayGrow ? PCRE2_PARTIAL_HARD : 0u);
  const int result = match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0, options,
                           scratch.data_->match, scratch.data_->context);
  if (result == PCRE2_ERROR_PARTIAL) return std::nullopt;
  if (result >= 0) {
    const size_t length = pcre2_get_ovector_pointer(scratch.data_->match)[1];
    if (length > 0) return length;
  }
  if (result < 0 && result != PCRE2_ERROR_NOMATCH) {
    throw std::runtime_error("pretokenizer: PCRE2 error " + std::to_string(result));
  }
  return static_cast<size_t>(utf8_decode(text).length);  // every pattern matches any character
}

}  // namespace sparsek
