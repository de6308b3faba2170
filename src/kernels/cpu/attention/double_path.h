// Attention in float64 throughout, for gradient checks: plain loops, one KV head after the other, threads over heads.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void forward_double(const AttentionFwdParams& params);
void backward_double(const AttentionBwdParams& params);
void window_mass_double(const WindowMassParams& params);

}  // namespace sparsek::cpu
