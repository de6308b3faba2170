// From a chunk's selection to the row arrays that attention reads, and the rows of eq. 1b (kernels/params.h, "Rows").
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

void chunk_visibility(const ChunkVisibilityParams& params);
void window_rows(const WindowRowsParams& params);

}  // namespace sparsek::cpu
