// From a selection to the row arrays that attention reads (kernels/params.h, "Rows").
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void visibility(const VisibilityParams& params);

}  // namespace sparsek::cpu
