// Selection on the CPU: eq. 1-6 of docs/math.md.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void select(const SelectParams& params);
void select_chunk(const SelectChunkParams& params);
void normalise_scores(const NormaliseParams& params);
void normalise_scores_backward(const NormaliseBwdParams& params);
void sparsek(const SparsekParams& params);

}  // namespace sparsek::cpu
