// Names and texts from files, made safe for a one-line message.
#pragma once
#include <string>
#include <string_view>

namespace sparsek {

// `text` in quotes, control characters and bytes that are not ASCII escaped, cut after 80 characters.
std::string in_quotes(std::string_view text);

}  // namespace sparsek
