// What one run of queries adds to the gradients of keys that other runs see too. Each run fills its own, and they are
// added up in the order of the runs (backward.cc), so that the sums do not depend on which thread was faster.
#pragma once
#include "kernels/cpu/attention/arena.h"
#include "kernels/cpu/attention/plan.h"

namespace sparsek::cpu {

struct RunGradients {
  RunGradients(Arena* arena, const RunPlan& plan, int32_t padded_dim_)
      : first_panel(plan.panel_of(plan.first_band_row)),
        num_panels(plan.panel_of(plan.end_band_row - 1) - first_panel + 1),
        first_panel_row(first_panel * kPanelKeys - plan.panel_shift),
        first_band_row(plan.first_band_row),
        end_band_row(plan.end_band_row),
        num_far(plan.tile_arrivals[plan.num_tiles]),
        padded_dim(padded_dim_) {
    const int64_t band_size = static_cast<int64_t>(num_panels) * kPanelKeys * padded_dim;
    band_dk = arena->take<float>(band_size);
    band_dv = arena->take<float>(band_size);
    far_dk = arena->take<float>(static_cast<int64_t>(num_far) * padded_dim);
    far_dv = arena->take<float>(static_cast<int64_t>(num_far) * padded_dim);
    far_h = arena->take<double>(num_far);
    far_row = arena->take<int32_t>(num_far);
  }

  int32_t first_panel, num_panels;
  int32_t first_panel_row;               // the row of band_dk[0]; may lie before first_band_row
  int32_t first_band_row, end_band_row;  // rows of the band that are anyone's
  int32_t num_far, padded_dim;
  float *band_dk, *band_dv;  // [num_panels * kPanelKeys][padded_dim]; dk everywhere without softmax_scale
  float *far_dk, *far_dv;    // [num_far][padded_dim], one for each arrival of the plan
  double* far_h;             // [num_far] H of eq. 11, the run's part
  int32_t* far_row;          // [num_far]
};

}  // namespace sparsek::cpu
