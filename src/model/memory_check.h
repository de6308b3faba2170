// Whether a run fits into memory, asked before it starts instead of found out in the middle.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>
#include <string>

namespace sparsek::model {

// Bytes that new allocations can get: the least of the kernel's MemAvailable, what the control group leaves and what
// the limit of the address space (RLIMIT_AS, `ulimit -v`) leaves. Nothing where the system does not say.
std::optional<int64_t> available_memory_bytes();
// The same of a device's memory; of the CPU's the line above.
std::optional<int64_t> available_memory_bytes(at::Device device);

struct MemoryPlan {
  int64_t weight_bytes = 0, state_bytes = 0, working_bytes = 0;
  at::Device device = at::kCPU;
  std::optional<int64_t> growing_tokens = {};  // the state is that of so many tokens, and grows with them
};

// Throws MemoryError naming `path` when the plan's parts together exceed what is available.
void check_memory(const std::string& path, const MemoryPlan& plan, std::optional<int64_t> available_bytes);

// Throws MemoryError when a cache cannot grow by `more_bytes` to hold `tokens` tokens.
void check_growth(int64_t tokens, int64_t more_bytes, std::optional<int64_t> available_bytes);

}  // namespace sparsek::model
