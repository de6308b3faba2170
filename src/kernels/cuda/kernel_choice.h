// Which of two sets of kernels runs: sm90 (wgmma) on devices of compute capability 9.0, portable (mma.sync) elsewhere.
#pragma once
#include <cstdint>

namespace sparsek::cuda {

// Whether a caller leaves the choice to the kernels or wants one set (tests, timings, which skip kSm90 where the device
// is another: there the portable set serves it too).
enum class KernelChoice : uint8_t { kAutomatic, kPortable, kSm90 };

// 10 * major + minor of the current device, asked for once per device.
int compute_capability();

}  // namespace sparsek::cuda
