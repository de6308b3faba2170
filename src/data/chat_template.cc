#include "data/chat_template.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "data/quote.h"

namespace sparsek {
namespace {

// The template with one kind of quotes, line ends written as \n, and no blanks: authors differ in these.
std::string squeezed(std::string_view jinja) {
  std::string out;
  for (const char c : jinja) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '"') {
      out += '\'';
    } else if (c != ' ' && c != '\t' && c != '\r') {
      out += c;
    }
  }
  return out;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != text.npos;
}

// The first literal text that stands between `begin`, a line end and `end` inside one string of the template.
std::optional<std::string> literal_between(std::string_view jinja, std::string_view begin, std::string_view end) {
  for (size_t at = jinja.find(begin); at != jinja.npos; at = jinja.find(begin, at + 1)) {
    std::string_view rest = jinja.substr(at + begin.size());
    if (rest.starts_with("\\n")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with("\n")) {
      rest.remove_prefix(1);
    } else {
      continue;
    }
    const std::string_view text = rest.substr(0, rest.find(end));
    if (text.size() == rest.size() || text.empty() || text.find_first_of("'\"{}") != text.npos) continue;
    return std::string(text);
  }
  return std::nullopt;
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n\v\f";
  const size_t begin = text.find_first_not_of(kBlanks);
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) + 1 - begin);
}

}  // namespace

ChatTemplate ChatTemplate::recognise(std::string_view jinja, std::string_view name) {
  const std::string text = squeezed(jinja);
  const bool has_role = contains(text, "+message['role']+") || contains(text, "+message.role+");
  ChatTemplate result;
  if (contains(text, "'<|im_start|>'+message") && contains(text, "<|im_end|>") &&
      contains(text, "<|im_start|>assistant\\n") && has_role && !contains(text, "<|im_sep|>")) {
    result.style = ChatStyle::kChatMl;
    result.default_system = literal_between(jinja, "<|im_start|>system", "<|im_end|>").value_or("");
    result.strips_thoughts = contains(text, "</think>");
    return result;
  }
  if (contains(text, "'<|start_header_id|>'+message") && contains(text, "<|end_header_id|>\\n\\n") &&
      contains(text, "<|eot_id|>") && contains(text, "<|start_header_id|>assistant<|end_header_id|>") && has_role) {
    result.style = ChatStyle::kLlama3;
    if (contains(jinja, "Cutting Knowledge Date: December 2023")) {
      // The date is the template's own for programs that know none, so that output depends on input alone.
      result.system_preamble = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";
    }
    return result;
  }
  throw_data(
      "{}: chat template: expected ChatML (<|im_start|>) or Llama 3 (<|start_header_id|>), found {}; give the text "
      "without a chat template",
      name, in_quotes(jinja));
}

std::string ChatTemplate::render(std::span<const ChatMessage> messages) const {
  std::string out;
  const bool has_system = !messages.empty() && messages.front().role == "system";
  if (style == ChatStyle::kChatMl) {
    const auto add = [&](std::string_view role, std::string_view content) {
      out += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", role, content);
    };
    if (!has_system && !default_system.empty()) add("system", default_system);
    for (const ChatMessage& message : messages) {
      std::string_view content = message.content;
      constexpr std::string_view kThoughtEnd = "</think>";
      const size_t thought = content.rfind(kThoughtEnd);
      if (strips_thoughts && message.role == "assistant" && thought != content.npos) {
        content.remove_prefix(thought + kThoughtEnd.size());
        content.remove_prefix(std::min(content.find_first_not_of('\n'), content.size()));
      }
      add(message.role, content);
    }
    return out + "<|im_start|>assistant\n";
  }
  const auto add = [&](std::string_view role, std::string_view content) {
    out += fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>", role, content);
  };
  if (!system_preamble.empty()) {
    add("system", system_preamble + std::string(has_system ? trimmed(messages.front().content) : ""));
    if (has_system) messages = messages.subspan(1);
  }
  for (const ChatMessage& message : messages) add(message.role, trimmed(message.content));
  return out + "<|start_header_id|>assistant<|end_header_id|>\n\n";
}

}  // namespace sparsek
