// The float64 decode step: plain loops on one thread, for checks. Everything but checking the scores and counting
// lengths.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void decode_step_f64(const DecodeStepParams& params);

}  // namespace sparsek::cpu
