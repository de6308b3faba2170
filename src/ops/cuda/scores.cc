// normalise_scores (eq. 1) and sparsek (eq. 2) on the GPU, with their gradients.
#include "kernels/cuda/scores/scores.h"

#include <algorithm>

#include "kernels/cuda/sparsek/sparsek.h"
#include "ops/cuda/checks.h"

namespace sparsek::ops::cuda {
namespace {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The inputs of eq. 1: checked, as parameters, with the contiguous copies these point to.
struct Normalise {
  int64_t batch, seqlen, heads;
  Tensor beta, gamma, slope;
  MaybeTensor stats;
  Documents documents;
  NormaliseParams params{};

  Normalise(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope, const MaybeTensor& stats,
            const MaybeTensor& cu_seqlens, bool timestep_norm)
      : batch((check_scores("raw", raw), raw.size(0))),
        seqlen(raw.size(1)),
        heads(raw.size(2)),
        beta(parameter("beta", beta, raw)),
        gamma(parameter("gamma", gamma, raw)),
        slope(parameter("slope", slope, raw)),
        documents(cu_seqlens, {"raw", raw, ""}, batch, seqlen) {
    if (given(stats)) {
      check_tensor({"stats", *stats, "[batch, num_kv_heads, 3]"}, {batch, heads, 3}, ScalarType::Double,
                   {"raw", raw, ""});
      check_value(!given(cu_seqlens), "stats and cu_seqlens cannot be given together: packed documents carry nothing");
      this->stats = as_contiguous(*stats);
    }
    params.dtype = DType::kF32;
    params.raw = raw.const_data_ptr();
    params.beta = this->beta.const_data_ptr();
    params.gamma = this->gamma.const_data_ptr();
    params.slope = this->slope.const_data_ptr();
    params.stats_in = data_or_null<double>(this->stats);
    params.cu_seqlens = documents.cu_seqlens;
    params.raw_strides = strides_of(raw);
    params.batch = checked_int32("batch", batch);
    params.seqlen = checked_int32("seqlen", seqlen);
    params.num_kv_heads = checked_int32("num_kv_heads", heads);
    params.num_documents = documents.count;
    params.timestep_norm = timestep_norm;
  }

 private:
  Tensor parameter(const char* name, const Tensor& tensor, const Tensor& raw) const {
    check_tensor({name, tensor, "[num_kv_heads]"}, {heads}, ScalarType::Float, {"raw", raw, ""});
    return as_contiguous(tensor);
  }
};

Tensors2 normalise_scores(const Tensor& raw, const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                          const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  check_scores("raw", raw);
  const OnDevice here(raw);
  Normalise normalise(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
  const int64_t batch = normalise.batch, seqlen = normalise.seqlen, heads = normalise.heads;
  const Tensor scores = empty({batch, seqlen, heads}, ScalarType::Float, raw),
               new_stats = empty({batch, heads, 3}, ScalarType::Double, raw);
  NormaliseParams& params = normalise.params;
  params.scores = scores.mutable_data_ptr();
  params.stats = data<double>(new_stats);
  params.scores_strides = {seqlen * heads, heads, 1};
  const Tensor workspace = here.workspace(sparsek::cuda::normalise_scores_workspace_bytes(params));
  sparsek::cuda::normalise_scores(params, workspace.mutable_data_ptr(), here.stream());
  return {scores, new_stats};
}

Tensors5 normalise_scores_backward(const MaybeTensor& dscores, const MaybeTensor& dstats, const Tensor& raw,
                                   const Tensor& beta, const Tensor& gamma, const Tensor& slope,
                                   const MaybeTensor& stats, const MaybeTensor& cu_seqlens, bool timestep_norm) {
  check_scores("raw", raw);
  const OnDevice here(raw);
  const Normalise normalise(raw, beta, gamma, slope, stats, cu_seqlens, timestep_norm);
  const int64_t batch = normalise.batch, seqlen = normalise.seqlen, heads = normalise.heads;
  const Argument like{"raw", raw, ""};
  Tensor gradient;
  if (given(dscores)) {
    check_tensor({"dscores", *dscores, "[batch, seqlen, num_kv_heads]"}, {batch, seqlen, heads}, ScalarType::Float,
                 like);
    gradient = *dscores;
  } else {
    gradient = torch::stable::new_zeros(raw, {batch, seqlen, heads});
  }
  MaybeTensor stats_gradient;
  if (given(dstats)) {
    check_tensor({"dstats", *dstats, "[batch, num_kv_heads, 3]"}, {batch, heads, 3}, ScalarType::Double, like);
    stats_gradient = as_contiguous(*dstats);
  }
  const auto of_heads = [&] { return empty({heads}, ScalarType::Float, raw); };
  const Tensor draw = empty({batch, seqlen, heads}, ScalarType::Float, raw);
  const Tensor dbeta = of_heads(), dgamma = of_heads(), dslope = of_heads();
  const bool carried = given(stats);
  const Tensor dstats_in =
      carried ? empty({batch, heads, 3}, ScalarType::Double, raw) : empty({0}, ScalarType::Double, raw);
  NormaliseBwdParams params{};
  params.fwd = normalise.params;
  params.dscores = gradient.const_data_ptr();
  params.dstats = data_or_null<double>(stats_gradient);
  params.draw = draw.mutable_data_ptr();
  params.dbeta = dbeta.mutable_data_ptr();
  params.dgamma = dgamma.mutable_data_ptr();
  params.dslope = dslope.mutable_data_ptr();
  params.dstats_in = carried ? data<double>(dstats_in) : nullptr;
  params.dscores_strides = strides_of(gradient);
  const Tensor workspace = here.workspace(sparsek::cuda::normalise_scores_backward_workspace_bytes(params));
  sparsek::cuda::normalise_scores_backward(params, workspace.mutable_data_ptr(), here.stream());
  return {draw, dbeta, dgamma, dslope, dstats_in};
}

DType check_float(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check_value(dtype == ScalarType::Float || dtype == ScalarType::Double, name, " must be Float or Double, got ",
              toString(dtype));
  return dtype == ScalarType::Double ? DType::kF64 : DType::kF32;
}

Tensor project(const Tensor& z, int64_t k) {
  check_value(z.dim() >= 1, "z must be [..., columns], got a scalar");
  const DType dtype = check_float("z", z);
  check_value(k >= 1, "k must be at least 1, got ", k);
  const OnDevice here(z);
  const Tensor values = as_contiguous(z);
  const Tensor p = torch::stable::empty_like(values);
  if (z.numel() == 0) return p;
  const int64_t columns = z.size(z.dim() - 1), rows = z.numel() / columns;
  const Tensor tau = empty({rows}, z.scalar_type(), z);
  sparsek::cuda::sparsek(
      {dtype, values.const_data_ptr(), p.mutable_data_ptr(), tau.mutable_data_ptr(), rows, columns, k}, here.stream());
  return p;
}

Tensor project_backward(const Tensor& dp, const Tensor& p) {
  check_on_gpu({"p", p, ""});
  check_value(p.dim() >= 1, "p must be [..., columns], got a scalar");
  const DType dtype = check_float("p", p);
  check_value(dp.scalar_type() == p.scalar_type() && dp.is_cuda() && dp.get_device_index() == p.get_device_index() &&
                  std::ranges::equal(dp.sizes(), p.sizes()),
              "dp must be like p, on its GPU, ", toString(p.scalar_type()), " ", shape_text(p), ", got ",
              toString(dp.scalar_type()), " ", shape_text(dp), " on ", dp.is_cuda() ? "a GPU" : "the CPU");
  const OnDevice here(p);
  const Tensor gradients = as_contiguous(dp), values = as_contiguous(p);
  const Tensor dz = torch::stable::empty_like(values);
  if (p.numel() == 0) return dz;
  const int64_t columns = p.size(p.dim() - 1), rows = p.numel() / columns;
  sparsek::cuda::sparsek_backward(
      {dtype, gradients.const_data_ptr(), values.const_data_ptr(), dz.mutable_data_ptr(), rows, columns},
      here.stream());
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsek, CUDA, m) {
  m.impl("normalise_scores", TORCH_BOX(&normalise_scores));
  m.impl("normalise_scores_backward", TORCH_BOX(&normalise_scores_backward));
  m.impl("sparsek", TORCH_BOX(&project));
  m.impl("sparsek_backward", TORCH_BOX(&project_backward));
}

}  // namespace sparsek::ops::cuda
