// Any bytes as a line of JSON: the same text, or the same refusal, whole and in pieces; what another parser takes is
// taken with the same text.
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "data/corpus/json_line.h"

namespace sparsek {
namespace {

std::optional<std::string> text_of(std::string_view line, size_t piece) {
  JsonLine parser("text");
  std::string text;
  while (!line.empty()) {
    if (parser.push(line.substr(0, piece), text)) return std::nullopt;
    line.remove_prefix(std::min(piece, line.size()));
  }
  const JsonLine::End end = parser.finish();
  if (end.problem || end.content == JsonLine::Content::kBlank) return std::nullopt;
  return text;
}

void check(std::string_view line, size_t piece) {
  const std::optional<std::string> whole = text_of(line, line.size() + 1);
  if (text_of(line, piece) != whole) std::abort();
  // The other parser takes a zero byte for the end of the text, and passes over a byte order mark.
  if (line.find('\0') != line.npos || line.starts_with('\xef')) return;
  int fields = 0, deepest = 0;
  const nlohmann::json value = nlohmann::json::parse(
      line,
      [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
        if (depth == 1 && event == nlohmann::json::parse_event_t::key && parsed == "text") ++fields;
        deepest = std::max(deepest, depth);
        return true;
      },
      /*allow_exceptions=*/false);
  if (value.is_discarded() || !value.is_object() || fields != 1 || !value.at("text").is_string() || deepest > 60)
    return;
  if (whole != value.at("text").get<std::string>()) std::abort();
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // No newline comes into a line.
  std::string line(reinterpret_cast<const char*>(data) + 1, size - 1);
  std::erase(line, '\n');
  sparsek::check(line, 1 + data[0] % 7);
  return 0;
}
