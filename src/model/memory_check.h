// Whether a run fits into memory, asked before it starts instead of found out in the middle.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace sparsek::model {

// Bytes that new allocations can get: the kernel's MemAvailable, or what the control group leaves if that is less.
// Nothing where the system does not say.
std::optional<int64_t> available_memory_bytes();

// Throws DataError naming `path` when weights, state and working memory together exceed what is available.
void check_memory(const std::string& path, int64_t weight_bytes, int64_t state_bytes, int64_t working_bytes,
                  std::optional<int64_t> available_bytes);

}  // namespace sparsek::model
