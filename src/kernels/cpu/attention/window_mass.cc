// Eq. 1b on all threads: runs in parallel, their sums added up in order.
#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/attention/double_path.h"
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/runs.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr PerIsa<decltype(&portable::window_mass_scratch_bytes)> kScratchBytes{
    &portable::window_mass_scratch_bytes, &avx2::window_mass_scratch_bytes, &avx512::window_mass_scratch_bytes};
constexpr PerIsa<decltype(&portable::window_mass_run)> kWindowMassRun{&portable::window_mass_run,
                                                                      &avx2::window_mass_run, &avx512::window_mass_run};

struct RunMass {
  int32_t first_row;
  std::vector<float> mass;
};

}  // namespace

void window_mass(const WindowMassParams& params) {
  if (params.batch == 0) return;
  if (params.dtype == DType::kF64) return window_mass_double(params);
  const auto scratch_bytes = kScratchBytes.active();
  const auto window_mass_run = kWindowMassRun.active();
  const int32_t tile = tile_queries(params.num_heads / params.num_kv_heads);
  constexpr int64_t kRuns = 128;
  const int64_t lanes = static_cast<int64_t>(params.batch) * params.num_kv_heads;
  const int32_t run_length = run_queries(lanes, params.seqlen_q, tile, kRuns);
  const int64_t runs_per_lane = (params.seqlen_q + run_length - 1) / run_length;
  std::vector<RunMass> runs(lanes * runs_per_lane);
  for_each_run(params, tile, run_length, [&](const RunPlan& plan, ScratchMemory* scratch, int64_t index) {
    runs[index].first_row = plan.first_band_row;
    runs[index].mass.resize(plan.end_band_row - plan.first_band_row);
    window_mass_run(params, plan, scratch->at_least(scratch_bytes(params, plan)), runs[index].mass.data());
  });
  const auto* mass_in = static_cast<const float*>(params.mass_in);
  auto* mass = static_cast<float*>(params.mass);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    float* out = mass + lane * params.seqlen_k;
    for (int32_t r = 0; r < params.seqlen_k; ++r) out[r] = mass_in ? mass_in[lane * params.seqlen_k + r] : 0.0f;
    for (int64_t n = lane * runs_per_lane; n < (lane + 1) * runs_per_lane; ++n) {
      for (size_t r = 0; r < runs[n].mass.size(); ++r) out[runs[n].first_row + r] += runs[n].mass[r];
    }
  }
}

}  // namespace sparsek::cpu
