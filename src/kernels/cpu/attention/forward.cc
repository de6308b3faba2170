// Eq. 7-9: picks the float64 path or the kernels of the active instruction set, and runs them on all threads.
#include "kernels/cpu/attention/attention.h"

#include "kernels/cpu/attention/double_path.h"
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/runs.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr PerIsa<decltype(&portable::forward_scratch_bytes)> kForwardScratchBytes{
    &portable::forward_scratch_bytes, &avx2::forward_scratch_bytes, &avx512::forward_scratch_bytes};
constexpr PerIsa<decltype(&portable::forward_run)> kForwardRun{&portable::forward_run, &avx2::forward_run,
                                                               &avx512::forward_run};

}  // namespace

void attention_forward(const AttentionFwdParams& params) {
  if (params.seqlen_q == 0 || params.batch == 0) return;
  if (params.dtype == DType::kF64) return forward_double(params);
  const auto scratch_bytes = kForwardScratchBytes.active();
  const auto forward_run = kForwardRun.active();
  const int32_t tile = tile_queries(params.num_heads / params.num_kv_heads);
  constexpr int64_t kRuns = 128;
  const int64_t lanes = static_cast<int64_t>(params.batch) * params.num_kv_heads;
  for_each_run(params, tile, run_queries(lanes, params.seqlen_q, tile, kRuns),
               [&](const RunPlan& plan, ScratchMemory* scratch, int64_t) {
                 forward_run(params, plan, scratch->at_least(scratch_bytes(params, plan)));
               });
}

}  // namespace sparsek::cpu
