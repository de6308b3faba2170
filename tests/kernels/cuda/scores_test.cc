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

// Against kernels/cpu, gradients of carried statistics included, and against the reference where nothing is carried.
TEST(CudaNormalise, GradientEqualsReferenceAndCpu) {
  SKIP_WITHOUT_DEVICE();
  for (int n = 0; n < 60; ++n) {
    Spec spec;
    spec.seqlen = std::vector<int64_t>{1, 5, 1000, 1024, 1025, 2500, 3000}[n % 7];
    if (n == 59) spec.seqlen = 1100000;  // more chunks than are scanned at once
    spec.num_kv_heads = 1 + n % 3;
    const bool documents = n % 2 == 1 && n != 59, timestep_norm = n % 5 != 0, carried = !documents && n % 4 == 0;
    const bool with_dstats = n % 3 != 0;
    spec.batch = documents ? 1 : 2;
    if (documents) {
      spec.cu_seqlens = {0, std::min<int64_t>(spec.seqlen, 3), std::min<int64_t>(spec.seqlen, 3),
                         std::min<int64_t>(spec.seqlen, 1024), spec.seqlen};
    }
    SCOPED_TRACE("case " + std::to_string(n) + " T " + std::to_string(spec.seqlen));
    const int64_t heads = spec.num_kv_heads, lanes = spec.batch * heads, size = spec.batch * spec.seqlen * heads;
    const Values raw = round_to_f32(normal(size, 70 + n, 2.0, n % 3 == 0 ? 30.0 : 0.0)),
                 gradient = round_to_f32(normal(size, 170 + n));
    const reference::NormaliseOptions options{round_to_f32(normal(heads, 1)), round_to_f32(normal(heads, 2)),
                                              round_to_f32(uniform(heads, 3)), timestep_norm};
    const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
    const std::vector<float> raw_f32 = to_f32(raw), dscores = to_f32(gradient), beta = to_f32(options.beta),
                             gamma = to_f32(options.gamma), slope = to_f32(options.slope);
    std::vector<double> stats_in(3 * lanes), dstats = normal(3 * lanes, 5);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      stats_in[3 * lane] = n % 8 == 0 ? 0 : 17, stats_in[3 * lane + 1] = 0.5 + static_cast<double>(lane);
      stats_in[3 * lane + 2] = n % 8 == 0 ? 0 : 40;
    }
    NormaliseBwdParams params{};
    params.fwd.dtype = DType::kF32;
    params.fwd.raw_strides = params.dscores_strides = contiguous(spec.seqlen, heads);
    params.fwd.batch = static_cast<int32_t>(spec.batch), params.fwd.seqlen = static_cast<int32_t>(spec.seqlen);
    params.fwd.num_kv_heads = static_cast<int32_t>(heads);
    params.fwd.num_documents = documents ? static_cast<int32_t>(cu_seqlens.size()) - 1 : 0;
    params.fwd.timestep_norm = timestep_norm;

    std::vector<float> draw(size), dbeta(heads), dgamma(heads), dslope(heads);
    std::vector<double> dstats_in(3 * lanes);
    NormaliseBwdParams on_cpu = params;
    on_cpu.fwd.raw = raw_f32.data(), on_cpu.fwd.beta = beta.data(), on_cpu.fwd.gamma = gamma.data(),
    on_cpu.fwd.slope = slope.data();
    on_cpu.fwd.stats_in = carried ? stats_in.data() : nullptr;
    on_cpu.fwd.cu_seqlens = documents ? cu_seqlens.data() : nullptr;
    on_cpu.dscores = dscores.data(), on_cpu.dstats = with_dstats ? dstats.data() : nullptr;
    on_cpu.draw = draw.data(), on_cpu.dbeta = dbeta.data(), on_cpu.dgamma = dgamma.data(),
    on_cpu.dslope = dslope.data(), on_cpu.dstats_in = dstats_in.data();
    cpu::normalise_scores_backward(on_cpu);

    const DeviceArray<float> in(raw_f32), betas(beta), gammas(gamma), slopes(slope), out(dscores), d_raw(size),
        d_beta(heads), d_gamma(heads), d_slope(heads);
    const DeviceArray<double> carried_stats(stats_in), d_stats(dstats), d_stats_in(3 * lanes);
    const DeviceArray<int32_t> starts(cu_seqlens);
    NormaliseBwdParams on_gpu = params;
    on_gpu.fwd.raw = in.data(), on_gpu.fwd.beta = betas.data(), on_gpu.fwd.gamma = gammas.data(),
    on_gpu.fwd.slope = slopes.data();
    on_gpu.fwd.stats_in = carried ? carried_stats.data() : nullptr;
    on_gpu.fwd.cu_seqlens = documents ? starts.data() : nullptr;
    on_gpu.dscores = out.data(), on_gpu.dstats = with_dstats ? d_stats.data() : nullptr;
    on_gpu.draw = d_raw.data(), on_gpu.dbeta = d_beta.data(), on_gpu.dgamma = d_gamma.data(),
    on_gpu.dslope = d_slope.data(), on_gpu.dstats_in = d_stats_in.data();
    const DeviceArray<uint8_t> workspace(cuda::normalise_scores_backward_workspace_bytes(on_gpu));
    cuda::normalise_scores_backward(on_gpu, workspace.data(), nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "normalise_scores_backward");
    const std::vector<float> first = d_raw.to_vector();
    // Both round the same sums in double to float32.
    EXPECT_CLOSE_TO_MAXIMUM(first, draw, 2e-7);
    EXPECT_CLOSE_TO_MAXIMUM(d_beta.to_vector(), dbeta, 2e-7);
    EXPECT_CLOSE_TO_MAXIMUM(d_gamma.to_vector(), dgamma, 2e-7);
    EXPECT_CLOSE_TO_MAXIMUM(d_slope.to_vector(), dslope, 2e-7);
    EXPECT_CLOSE_TO_MAXIMUM(d_stats_in.to_vector(), dstats_in, 1e-9);
    if (!carried && !with_dstats && spec.seqlen <= 3000) {
      const auto expected = reference::normalise_scores_backward(raw, gradient, options, spec);
      EXPECT_CLOSE_TO_MAXIMUM(first, expected.draw, 2e-7);
      EXPECT_CLOSE_TO_MAXIMUM(d_gamma.to_vector(), expected.dgamma, 2e-7);
      EXPECT_CLOSE_TO_MAXIMUM(d_slope.to_vector(), expected.dslope, 2e-7);
    }
    cuda::normalise_scores_backward(on_gpu, workspace.data(), nullptr);
    EXPECT_TRUE(d_raw.to_vector() == first) << "differs from run to run";
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace sparsek::test
