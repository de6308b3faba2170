// A small file as a string.
#pragma once
#include <string>

namespace sparsek {

// All of `path`, which may be a pipe. Throws DataError naming the path when it cannot be opened or read.
std::string read_file(const std::string& path);

}  // namespace sparsek
