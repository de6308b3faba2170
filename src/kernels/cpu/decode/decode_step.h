// One token in constant memory on the CPU: section 6 of docs/math.md.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void decode_step(const DecodeStepParams& params);

}  // namespace sparsek::cpu
