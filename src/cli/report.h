// JSON on standard output, and whether it got there.
#pragma once
#include <nlohmann/json_fwd.hpp>

namespace sparsek::cli {

// One object and a newline; bytes that are not UTF-8 (names from files and paths) become U+FFFD. indent -1: one line.
void print_json(const nlohmann::ordered_json& object, int indent = -1);

// Throws DataError when standard output did not take everything written to it.
void check_output();

}  // namespace sparsek::cli
