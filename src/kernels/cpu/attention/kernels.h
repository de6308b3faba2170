// The functions that *.simd.cc files of this folder define once per instruction set. A run is described by its plan;
// its scratch is `..._scratch_bytes` bytes aligned to Arena::kAlignment, with anything in it.
#pragma once
#include "kernels/cpu/attention/plan.h"

#define SPARSEK_DECLARE_ATTENTION_KERNELS(isa)                                            \
  namespace isa {                                                                         \
  size_t forward_scratch_bytes(const AttentionFwdParams& params, const RunPlan& plan);    \
  void forward_run(const AttentionFwdParams& params, const RunPlan& plan, char* scratch); \
  }

namespace sparsek::cpu {
SPARSEK_DECLARE_ATTENTION_KERNELS(portable)
SPARSEK_DECLARE_ATTENTION_KERNELS(avx2)
SPARSEK_DECLARE_ATTENTION_KERNELS(avx512)
}  // namespace sparsek::cpu

#undef SPARSEK_DECLARE_ATTENTION_KERNELS
