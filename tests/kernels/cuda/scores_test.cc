// Score normalisation and the score gradient on the GPU, against kernels/reference, kernels/cpu and eq. 11 as it
// stands.
#include "kernels/cuda/scores/scores.h"

#include <gtest/gtest.h>

#include "tests/kernels/cuda/device.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::Spec;

TEST(CudaScoreGradient, EqualsEquation11) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t seqlen : {1, 2, 255, 1023, 1024, 1025, 4096, 5003}) {
    for (const ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kRising, ScoreKind::kNormalSmall}) {
      SCOPED_TRACE(std::string(name(kind)) + " T " + std::to_string(seqlen));
      Spec spec;
      spec.seqlen = seqlen;
      spec.num_kv_heads = 2;
      spec.topk = 20;
      spec.window_size = 9;
      spec.pool_size = 90;
      const std::vector<float> scores = to_f32(make_scores(kind, 1, seqlen, 2, 5));
      const SelectResult<float> selection = run_select(scores, spec);
      const int64_t size = 2 * seqlen;
      std::vector<int32_t> begin(size), end(size);  // [lane, seqlen]; beyond the sequence's end: clamped
      for (int64_t j = 0; j < seqlen; ++j) {
        for (int64_t h = 0; h < 2; ++h) {
          begin[h * seqlen + j] = selection.frac_begin[j * 2 + h], end[h * seqlen + j] = selection.frac_end[j * 2 + h];
        }
      }
      const std::vector<float> h_key = to_f32(normal(size, 8)), h_query = to_f32(normal(size, 9, 3.0));
      Values expected(size, 0.0);
      for (int64_t h = 0; h < 2; ++h) {
        std::vector<int64_t> count(seqlen, 0);
        for (int64_t j = 0; j < seqlen; ++j) {
          for (int64_t i = begin[h * seqlen + j]; i < std::min<int64_t>(end[h * seqlen + j], seqlen); ++i) ++count[i];
        }
        for (int64_t j = 0; j < seqlen; ++j) {
          double sum = 0;
          const int64_t last = std::min<int64_t>(end[h * seqlen + j], seqlen);
          for (int64_t i = begin[h * seqlen + j]; i < last; ++i) {
            sum += h_query[h * seqlen + i] / static_cast<double>(count[i]);
          }
          if (begin[h * seqlen + j] < last) expected[h * seqlen + j] = h_key[h * seqlen + j] - sum;
        }
      }
      const DeviceArray<float> keys(h_key), queries(h_query), dscores(size);
      const DeviceArray<int32_t> begins(begin), ends(end);
      const auto length = static_cast<int32_t>(seqlen);
      const cuda::ScoreGradientParams params{
          keys.data(), queries.data(), begins.data(), ends.data(), dscores.data(), 2, length, length, 0};
      const DeviceArray<uint8_t> workspace(cuda::score_gradient_workspace_bytes(params));
      cuda::score_gradient(params, workspace.data(), nullptr);
      cuda::check_cuda(cudaDeviceSynchronize(), "score_gradient");
      // float32 outputs of sums in double: half a unit in the last place of the larger term.
      EXPECT_ELEMENTS_CLOSE(dscores.to_vector(), expected, 1e-6);
      if (HasFailure()) return;
    }
  }
}

TEST(CudaNormalise, EqualsReferenceAndCpu) {
  SKIP_WITHOUT_DEVICE();
  for (int n = 0; n < 40; ++n) {
    Spec spec;
    spec.seqlen = std::vector<int64_t>{1, 5, 1000, 1024, 1025, 2500, 3000}[n % 7];
    spec.num_kv_heads = 1 + n % 3;
    const bool documents = n % 2 == 1, timestep_norm = n % 5 != 0, carried = !documents && n % 4 == 0;
    spec.batch = documents ? 1 : 2;
    if (documents) {
      spec.cu_seqlens = {0, std::min<int64_t>(spec.seqlen, 3), std::min<int64_t>(spec.seqlen, 3),
                         std::min<int64_t>(spec.seqlen, 1024), spec.seqlen};
    }
    SCOPED_TRACE("case " + std::to_string(n) + " T " + std::to_string(spec.seqlen));
    const int64_t heads = spec.num_kv_heads, lanes = spec.batch * heads;
    const Values raw = round_to_f32(normal(spec.batch * spec.seqlen * heads, 70 + n, 2.0, n % 3 == 0 ? 30.0 : 0.0));
    const reference::NormaliseOptions options{round_to_f32(normal(heads, 1)), round_to_f32(normal(heads, 2)),
                                              round_to_f32(uniform(heads, 3)), timestep_norm};
    const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
    const std::vector<float> raw_f32 = to_f32(raw), beta = to_f32(options.beta), gamma = to_f32(options.gamma),
                             slope = to_f32(options.slope);
    std::vector<double> stats_in(3 * lanes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      stats_in[3 * lane] = 17, stats_in[3 * lane + 1] = 0.5 + static_cast<double>(lane), stats_in[3 * lane + 2] = 40;
    }
    NormaliseParams params{};
    params.dtype = DType::kF32;
    params.raw_strides = params.scores_strides = contiguous(spec.seqlen, heads);
    params.batch = static_cast<int32_t>(spec.batch);
    params.seqlen = static_cast<int32_t>(spec.seqlen);
    params.num_kv_heads = static_cast<int32_t>(heads);
    params.num_documents = documents ? static_cast<int32_t>(cu_seqlens.size()) - 1 : 0;
    params.timestep_norm = timestep_norm;

    std::vector<float> cpu_scores(raw.size());
    std::vector<double> cpu_stats(3 * lanes);
    NormaliseParams on_cpu = params;
    on_cpu.raw = raw_f32.data(), on_cpu.beta = beta.data(), on_cpu.gamma = gamma.data(), on_cpu.slope = slope.data();
    on_cpu.stats_in = carried ? stats_in.data() : nullptr;
    on_cpu.cu_seqlens = documents ? cu_seqlens.data() : nullptr;
    on_cpu.scores = cpu_scores.data(), on_cpu.stats = cpu_stats.data();
    cpu::normalise_scores(on_cpu);

    const DeviceArray<float> in(raw_f32), betas(beta), gammas(gamma), slopes(slope), scores(std::ssize(raw));
    const DeviceArray<double> stats(3 * lanes), carried_stats(stats_in);
    const DeviceArray<int32_t> starts(cu_seqlens);
    NormaliseParams on_gpu = params;
    on_gpu.raw = in.data(), on_gpu.beta = betas.data(), on_gpu.gamma = gammas.data(), on_gpu.slope = slopes.data();
    on_gpu.stats_in = carried ? carried_stats.data() : nullptr;
    on_gpu.cu_seqlens = documents ? starts.data() : nullptr;
    on_gpu.scores = scores.data(), on_gpu.stats = stats.data();
    const DeviceArray<uint8_t> workspace(cuda::normalise_scores_workspace_bytes(on_gpu));
    cuda::normalise_scores(on_gpu, workspace.data(), nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "normalise_scores");
    // float32 rounding of u, whose terms reach 100.
    EXPECT_ELEMENTS_CLOSE(scores.to_vector(), Values(cpu_scores.begin(), cpu_scores.end()), 2e-6);
    EXPECT_ELEMENTS_CLOSE(stats.to_vector(), cpu_stats, 1e-9);
    if (!carried) {
      EXPECT_ELEMENTS_CLOSE(scores.to_vector(), reference::normalise_scores(raw, options, spec), 2e-6);
    }
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace sparsek::test
