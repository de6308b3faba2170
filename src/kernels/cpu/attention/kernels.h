// The functions that the *.simd.cc files of this folder define once per instruction set. A run is described by its
// plan; its scratch is `..._scratch_bytes` bytes aligned to Arena::kAlignment, with anything in it.
//   backward_run     writes dq (and dq_far), all of `gradients`, and of h_sums [seqlen_q] the run's queries: the sums
//   of
//                    h_ij (eq. 10) over the keys that are fractional at query i.
//   window_mass_run  writes mass [end_band_row - first_band_row]: what the run's queries add to the rows of its band.
#pragma once
#include "kernels/cpu/attention/plan.h"
#include "kernels/cpu/attention/run_gradients.h"

#define SPARSEK_DECLARE_ATTENTION_KERNELS(isa)                                                           \
  namespace isa {                                                                                        \
  size_t forward_scratch_bytes(const AttentionFwdParams& params, const RunPlan& plan);                   \
  void forward_run(const AttentionFwdParams& params, const RunPlan& plan, char* scratch);                \
  size_t backward_scratch_bytes(const AttentionBwdParams& params, const RunPlan& plan);                  \
  void backward_run(const AttentionBwdParams& params, const RunPlan& plan, char* scratch,                \
                    const RunGradients& gradients, double* h_sums);                                      \
  size_t window_mass_scratch_bytes(const WindowMassParams& params, const RunPlan& plan);                 \
  void window_mass_run(const WindowMassParams& params, const RunPlan& plan, char* scratch, float* mass); \
  }

namespace sparsek::cpu {
SPARSEK_DECLARE_ATTENTION_KERNELS(portable)
SPARSEK_DECLARE_ATTENTION_KERNELS(avx2)
SPARSEK_DECLARE_ATTENTION_KERNELS(avx512)
}  // namespace sparsek::cpu

#undef SPARSEK_DECLARE_ATTENTION_KERNELS
