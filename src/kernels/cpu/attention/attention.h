// Attention over window and far rows on the CPU: eq. 1b, 7-9 and section 5 of docs/math.md.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void attention_forward(const AttentionFwdParams& params);
void attention_backward(const AttentionBwdParams& params);
void window_mass(const WindowMassParams& params);

}  // namespace sparsek::cpu
