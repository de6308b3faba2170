#include "data/json_file.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/error.h"
#include "base/mapped_file.h"
#include "data/quote.h"

namespace sparsek {
namespace {

constexpr size_t kMaxBytes = size_t{256} << 20;
constexpr int kMaxDepth = 64;

// Nesting is counted before parsing, so that no depth is ever built that a later pass would have to recurse into.
int nesting_depth(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& name) {
  if (text.size() > kMaxBytes)
    throw_data("{}: expected at most {} bytes of JSON, found {}", name, kMaxBytes, text.size());
  if (const int depth = nesting_depth(text); depth > kMaxDepth) {
    throw_data("{}: expected JSON nested at most {} deep, found {}", name, kMaxDepth, depth);
  }
  std::unordered_set<std::string> outer_keys;
  const auto refuse_repeated = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    if (event == nlohmann::json::parse_event_t::key && depth == 1) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!outer_keys.insert(key).second) throw_data("{}: JSON key {} appears twice", name, in_quotes(key));
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), refuse_repeated);
  } catch (const nlohmann::json::parse_error& error) {
    throw_data("{}: expected JSON, found an error at byte {} of {}; the file is damaged or truncated", name, error.byte,
               text.size());
  } catch (const nlohmann::json::exception& error) {  // a number out of range
    throw_data("{}: expected JSON, found {}", name, in_quotes(error.what()));
  }
}

nlohmann::json read_json_object(const std::string& path) {
  const MappedFile file(path);
  nlohmann::json json =
      parse_json({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, file.path());
  if (!json.is_object()) throw_data("{}: expected a JSON object, found {}", path, json.type_name());
  return json;
}

}  // namespace sparsek
