// Entry points: picks the float64 path or the kernels of the active instruction set, and runs them on all threads.
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

RunShape shape_of(const AttentionFwdParams& p, int32_t batch, int32_t kv_head) {
  const int64_t rows = (static_cast<int64_t>(batch) * p.num_kv_heads + kv_head) * p.seqlen_k;
  return {p.window_begin + static_cast<int64_t>(batch) * p.seqlen_q,
          p.far_begin + rows,
          p.far_end + rows,
          p.seqlen_q,
          p.seqlen_k,
          p.num_carried};
}

}  // namespace

void attention_forward(const AttentionFwdParams& params) {
  if (params.seqlen_q == 0 || params.batch == 0) return;
  if (params.dtype == DType::kF64) return forward_double(params);
  const auto scratch_bytes = kForwardScratchBytes.active();
  const auto forward_run = kForwardRun.active();
  const int32_t tile = tile_queries(params.num_heads / params.num_kv_heads);
  const int32_t run = run_queries(static_cast<int64_t>(params.batch) * params.num_kv_heads, params.seqlen_q, tile);
  for_each_run(
      params.batch, params.num_kv_heads, params.seqlen_q, tile, run,
      [&](int32_t batch, int32_t kv_head) { return shape_of(params, batch, kv_head); },
      [&](const RunPlan& plan, ScratchMemory* scratch, int32_t) {
        forward_run(params, plan, scratch->at_least(scratch_bytes(params, plan)));
      });
}

}  // namespace sparsek::cpu
