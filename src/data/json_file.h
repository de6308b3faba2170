// JSON from files that may be damaged or hostile: bounded in size and depth, errors as one line.
#pragma once
#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace sparsek {

// `name` stands for the file in messages. Objects with a key twice at the outermost level are refused.
nlohmann::json parse_json(std::string_view text, const std::string& name);
// The file's content, which must be an object.
nlohmann::json read_json_object(const std::string& path);

}  // namespace sparsek
