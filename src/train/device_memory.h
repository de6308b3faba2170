// The most memory a run has taken so far, and when a device is done.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>

namespace sparsek::train {

// Of torch's allocator on a GPU; of the process on a CPU.
int64_t peak_memory_bytes(c10::Device device);
// From now on the peak of a GPU is what is taken from now on, and memory that nobody holds goes back to it.
void forget_peak_memory(c10::Device device);

// Until everything given to the device has run.
void wait_for(c10::Device device);

}  // namespace sparsek::train
