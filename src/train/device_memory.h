// The most memory a run has taken so far.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>

namespace sparsek::train {

// Of torch's allocator on a GPU; of the process on a CPU.
int64_t peak_memory_bytes(c10::Device device);

}  // namespace sparsek::train
