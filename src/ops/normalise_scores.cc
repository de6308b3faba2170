// normalise_scores: eq. 1, scores from a scorer's raw outputs by running mean and variance. Gradients flow through the
// running statistics, those carried in included.
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/cpu/select/select.h"
#include "ops/checks.h"
#include "ops/once_differentiable.h"
#include "ops/ops.h"
#include "ops/tensors.h"

namespace sparsek::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
           const MaybeTensor& cu_seqlens) {
  check_scores("raw", raw);
  const Argument like{"raw", raw, ""};
  const c10::SymInt heads = raw.sym_size(2);
  check_tensor({"beta", beta, "[num_kv_heads]"}, {heads}, raw.scalar_type(), like);
  check_tensor({"gamma", gamma, "[num_kv_heads]"}, {heads}, raw.scalar_type(), like);
  check_tensor({"slope", slope, "[num_kv_heads]"}, {heads}, raw.scalar_type(), like);
  if (given(stats)) {
    check_tensor({"stats", *stats, "[batch, num_kv_heads, 3]"}, {raw.sym_size(0), heads, 3}, at::kDouble, like);
    TORCH_CHECK_VALUE(!given(cu_seqlens),
                      "stats and cu_seqlens cannot be given together: packed documents carry nothing");
  }
  check_cu_seqlens(cu_seqlens, "raw", raw);
}

Tensors2 allocate(const Tensor& raw) {
  return {empty_of({raw.sym_size(0), raw.sym_size(1), raw.sym_size(2)}, raw.options()),
          empty_of({raw.sym_size(0), raw.sym_size(2), 3}, raw.options().dtype(at::kDouble))};
}

// The parameters, and the contiguous copies they point to.
struct Forward {
  Tensor beta, gamma, slope;
  MaybeTensor stats;
  NormaliseParams params{};

  Forward(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
          const MaybeTensor& cu_seqlens, bool timestep_norm)
      : beta(beta.contiguous()),
        gamma(gamma.contiguous()),
        slope(slope.contiguous()),
        stats(given(stats) ? MaybeTensor(stats->contiguous()) : MaybeTensor()) {
    params.dtype = dtype_of(raw);
    params.raw = raw.const_data_ptr();
    params.beta = this->beta.const_data_ptr();
    params.gamma = this->gamma.const_data_ptr();
    params.slope = this->slope.const_data_ptr();
    params.stats_in = data_or_null<double>(this->stats);
    params.cu_seqlens = data_or_null<int32_t>(cu_seqlens);
    params.raw_strides = strides_of(raw);
    params.batch = checked_int32("batch", raw.size(0));
    params.seqlen = checked_int32("seqlen", raw.size(1));
    params.num_kv_heads = checked_int32("num_kv_heads", raw.size(2));
    params.num_documents = given(cu_seqlens) ? checked_int32("documents", cu_seqlens->size(0) - 1) : 1;
    params.timestep_norm = timestep_norm;
  }
};

Tensors2 normalise_meta(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                        const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  check(raw, beta, gamma, slope, stats, cu_seqlens);
  return allocate(raw);
}

Tensors2 normalise_cpu(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                       const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  check(raw, beta, gamma, slope, stats, cu_seqlens);
  check_cu_seqlens_values(cu_seqlens, raw.size(1));
  const auto [scores, new_stats] = allocate(raw);
  Forward forward(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
  forward.params.scores = scores.data_ptr();
  forward.params.stats = new_stats.data_ptr<double>();
  forward.params.scores_strides = strides_of(scores);
  cpu::normalise_scores(forward.params);
  return {scores, new_stats};
}

Tensors5 allocate_gradients(const Tensor& raw, const Tensor& beta, const MaybeTensor& stats) {
  const auto heads = [&] { return empty_of({beta.sym_size(0)}, beta.options()); };
  return {std::get<0>(allocate(raw)), heads(), heads(), heads(),
          given(stats) ? std::get<1>(allocate(raw)) : empty_of({0}, raw.options().dtype(at::kDouble))};
}

Tensors5 backward_meta(const MaybeTensor& dscores, const MaybeTensor& dstats, const Tensor& raw, const Tensor& beta,
                       const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
                       const MaybeTensor& cu_seqlens, bool timestep_norm) {
  return allocate_gradients(raw, beta, stats);
}

Tensors5 backward_cpu(const MaybeTensor& dscores, const MaybeTensor& dstats, const Tensor& raw, const Tensor& beta,
                      const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats, const MaybeTensor& cu_seqlens,
                      bool timestep_norm) {
  check(raw, beta, gamma, slope, stats, cu_seqlens);
  check_cu_seqlens_values(cu_seqlens, raw.size(1));
  const Argument like{"raw", raw, ""};
  const Tensor gradient = given(dscores) ? *dscores : at::zeros_like(raw);
  check_tensor({"dscores", gradient, "[batch, seqlen, num_kv_heads]"}, {raw.size(0), raw.size(1), raw.size(2)},
               raw.scalar_type(), like);
  const MaybeTensor stats_gradient = given(dstats) ? MaybeTensor(dstats->contiguous()) : MaybeTensor();
  if (given(dstats)) {
    check_tensor({"dstats", *stats_gradient, "[batch, num_kv_heads, 3]"}, {raw.size(0), raw.size(2), 3}, at::kDouble,
                 like);
  }
  Tensors5 gradients = allocate_gradients(raw, beta, stats);
  auto& [draw, dbeta, dgamma, dslope, dstats_in] = gradients;
  NormaliseBwdParams params{};
  const Forward forward(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
  params.fwd = forward.params;
  params.dscores = gradient.const_data_ptr();
  params.dstats = data_or_null<double>(stats_gradient);
  params.draw = draw.data_ptr();
  params.dbeta = dbeta.data_ptr();
  params.dgamma = dgamma.data_ptr();
  params.dslope = dslope.data_ptr();
  params.dstats_in = given(stats) ? dstats_in.data_ptr<double>() : nullptr;
  params.dscores_strides = strides_of(gradient);
  cpu::normalise_scores_backward(params);
  return gradients;
}

Tensors2 call_normalise(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                        const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  static const auto operation = find_operation<decltype(normalise_cpu)>("sparsek::normalise_scores");
  return operation.call(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
}

Tensors5 call_backward(const MaybeTensor& dscores, const MaybeTensor& dstats, const Tensor& raw, const Tensor& beta,
                       const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
                       const MaybeTensor& cu_seqlens, bool timestep_norm) {
  static const auto operation = find_operation<decltype(backward_cpu)>("sparsek::normalise_scores_backward");
  return operation.call(dscores, dstats, raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
}

Tensors5 backward_autograd(const MaybeTensor& dscores, const MaybeTensor& dstats, const Tensor& raw, const Tensor& beta,
                           const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
                           const MaybeTensor& cu_seqlens, bool timestep_norm) {
  std::vector<Tensor> differentiable = {raw, beta, gamma, slope};
  for (const MaybeTensor* tensor : {&dscores, &dstats, &stats}) {
    if (given(*tensor)) differentiable.push_back(**tensor);
  }
  const variable_list g = RefuseSecondDerivative::apply(
      at::TensorList(differentiable), "normalise_scores_backward", [&]() -> variable_list {
        const auto [draw, dbeta, dgamma, dslope, dstats_in] =
            call_backward(dscores, dstats, raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
        return {draw, dbeta, dgamma, dslope, dstats_in};
      });
  return {g[0], g[1], g[2], g[3], g[4]};
}

struct NormaliseFunction : torch::autograd::Function<NormaliseFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& raw, const Tensor& beta, const Tensor& gamma,
                               const Tensor& slope, const MaybeTensor& stats, const MaybeTensor& cu_seqlens,
                               bool timestep_norm) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({raw, beta, gamma, slope, stats.value_or(Tensor()), cu_seqlens.value_or(Tensor())});
    ctx->saved_data["timestep_norm"] = timestep_norm;
    const BelowAutograd below;
    const auto [scores, new_stats] = call_normalise(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
    return {scores, new_stats};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto maybe = [](const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : MaybeTensor(); };
    const auto [draw, dbeta, dgamma, dslope, dstats_in] =
        call_backward(maybe(grads[0]), maybe(grads[1]), saved[0], saved[1], saved[2], saved[3], maybe(saved[4]),
                      maybe(saved[5]), ctx->saved_data["timestep_norm"].toBool());
    return {draw, dbeta, dgamma, dslope, saved[4].defined() ? dstats_in : Tensor(), {}, {}};
  }
};

Tensors2 normalise_autograd(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                            const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  const variable_list out = NormaliseFunction::apply(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
  return {out[0], out[1]};
}

}  // namespace

std::tuple<Tensor, Tensor> normalise_scores(const Tensor& raw, const Tensor& beta, const Tensor& gamma,
                                            const Tensor& slope, const MaybeTensor& stats,
                                            const MaybeTensor& cu_seqlens, bool timestep_norm) {
  return call_normalise(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
}

TORCH_LIBRARY_IMPL(sparsek, CPU, m) {
  m.impl("normalise_scores", normalise_cpu);
  m.impl("normalise_scores_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(sparsek, Meta, m) {
  m.impl("normalise_scores", normalise_meta);
  m.impl("normalise_scores_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(sparsek, Autograd, m) {
  m.impl("normalise_scores", normalise_autograd);
  m.impl("normalise_scores_backward", backward_autograd);
}

}  // namespace sparsek::ops
