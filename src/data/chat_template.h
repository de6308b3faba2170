// Chat templates: ChatML and Llama 3, recognised from the template's text and rendered by code here. Jinja is not
// executed; a template of any other kind is refused by name.
#pragma once
#include <span>
#include <string>
#include <string_view>

namespace sparsek {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

enum class ChatStyle { kChatMl, kLlama3 };

struct ChatTemplate {
  ChatStyle style = ChatStyle::kChatMl;
  std::string default_system;    // put before the first message when that is no system message; may be empty
  std::string system_preamble;   // what a Llama 3.1 system message begins with, even an empty one
  bool strips_thoughts = false;  // earlier answers lose what stands before "</think>" (Qwen 3)

  // `name` stands for the file in messages. DataError when the template is neither ChatML nor Llama 3.
  static ChatTemplate recognise(std::string_view jinja, std::string_view name);

  // The text of the conversation up to where the assistant answers; encode it with SpecialTokens::kParse. It does not
  // contain BOS: put Tokenizer::prefix() before it.
  std::string render(std::span<const ChatMessage> messages) const;
};

}  // namespace sparsek
