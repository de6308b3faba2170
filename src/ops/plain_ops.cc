#include "ops/plain_ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

#include <limits>

#include "ops/gpu_elementwise.h"

namespace sparsek::ops {
namespace {

thread_local bool on_cpu_too = false;

}  // namespace

PlainOperations::PlainOperations(bool chosen) : before_(on_cpu_too) {
  on_cpu_too = on_cpu_too || chosen;
}
PlainOperations::~PlainOperations() {
  on_cpu_too = before_;
}

std::pair<Tensor, Tensor> plain_rotary_table(const Tensor& positions, const Tensor& inverse_frequencies) {
  const Tensor angles = positions.to(at::kDouble).unsqueeze(1) * inverse_frequencies;
  const Tensor cos = angles.cos(), sin = angles.sin();
  return {at::cat({cos, cos}, 1).to(at::kFloat), at::cat({-sin, sin}, 1).to(at::kFloat)};
}

namespace plain {
namespace {

// x W^T in the dtype of y, accumulated in float32.
void product_out(const Tensor& x, const Tensor& weight, Tensor& y) {
  const Tensor w = weight.t();
  if (x.scalar_type() == w.scalar_type() && y.scalar_type() == w.scalar_type()) {
    at::mm_out(y, x, w);
  } else if (x.is_cuda() && x.scalar_type() == w.scalar_type()) {
    at::mm_out(y, x, w, y.scalar_type());
  } else {
    y.copy_(at::mm(x.to(at::kFloat), w.to(at::kFloat)));
  }
}

// [1, length, heads, head_dim] as [1, heads, length, head_dim], each KV head once a query head of its group.
Tensor head_major(const Tensor& x, int64_t num_heads) {
  const Tensor heads = x.transpose(1, 2);
  const int64_t group = num_heads / x.size(2);
  return group == 1 ? heads : heads.repeat_interleave(group, 1);
}

// bool [tokens, rows] of each way to see a row; far undefined where there are no far rows.
struct Visible {
  Tensor window, far;
};

Visible visible(const RowAttentionInputs& in) {
  const int64_t tokens = in.q.size(1), rows = in.k.size(1);
  const auto integers = in.q.options().dtype(at::kInt);
  const Tensor query = at::arange(tokens, integers).unsqueeze(1), row = at::arange(rows, integers).unsqueeze(0);
  const auto here = [&](const Tensor& x) { return x.to(in.q.device()); };
  Visible seen;
  seen.window = row.le(query + in.num_carried);
  if (in.window_begin.defined()) seen.window = seen.window & row.ge(here(in.window_begin).unsqueeze(1));
  if (in.far_begin.defined()) {
    seen.far = query.ge(here(in.far_begin).unsqueeze(0)) & query.lt(here(in.far_end).unsqueeze(0));
  }
  return seen;
}

// With queries and keys of its own for far rows: one softmax over both kinds, in float32.
Tensor attention_with_far(const RowAttentionInputs& in, const Visible& seen) {
  const int64_t num_heads = in.q.size(2);
  const auto logits = [&](const Tensor& q, const Tensor& k) {
    const Tensor keys = head_major(k, num_heads).to(at::kFloat);
    return at::matmul(q.transpose(1, 2).to(at::kFloat), keys.transpose(2, 3)) * in.softmax_scale;
  };
  const Tensor both = at::where(seen.window, logits(in.q, in.k), logits(in.q_far, in.k_far));
  const Tensor masked =
      both.masked_fill((seen.window | seen.far).logical_not(), -std::numeric_limits<float>::infinity());
  const Tensor out = at::matmul(at::softmax(masked, -1), head_major(in.v, num_heads).to(at::kFloat));
  return out.to(in.q.scalar_type()).transpose(1, 2).contiguous();
}

}  // namespace

bool is_chosen(const Tensor& x) {
  return on_cpu_too || !x.is_cpu();
}

void linear_out(const Tensor& x, const PackedLinear& weight, Tensor& y) {
  product_out(x, weight.plain, y);
  if (weight.bias.defined()) y.add_(weight.bias);
}

void linear_add_(Tensor& y, const Tensor& x, const PackedLinear& weight) {
  if (x.is_cuda()) {
    at::addmm_out(y, y, x, weight.plain.t(), at::kFloat);
  } else {
    y.add_(at::mm(x.to(at::kFloat), weight.plain.t().to(at::kFloat)));
  }
  if (weight.bias.defined()) y.add_(weight.bias);
}

void embedding_out(const Tensor& ids, const PackedLinear& weight, Tensor& y) {
  y.copy_(weight.plain.index_select(0, ids.to(weight.plain.device())));
}

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  if (!gpu::rms_norm_out(x, weight, eps, out)) out.copy_(at::rms_norm(x, x.size(1), weight, eps));
}

void head_norm_(Tensor& x, const Tensor& weight, double eps) {
  x.copy_(at::rms_norm(x.to(at::kFloat), x.size(2), weight, eps));
}

void rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out) {
  if (gpu::rotary_out(x, cos, sin, out)) return;
  // Rolled by half a head, each channel stands where its pair was, and sin is (-sin | sin).
  const Tensor rolled = at::roll(x, x.size(2) / 2, 2);
  out.copy_((x * cos.unsqueeze(1)).addcmul_(rolled, sin.unsqueeze(1)));
}

Tensor swiglu_(Tensor& gate_up) {
  const int64_t ffn = gate_up.size(1) / 2;
  Tensor gate = gate_up.narrow(1, 0, ffn);
  const Tensor up = gate_up.narrow(1, ffn, ffn);
  if (!gpu::swiglu_(gate, up)) at::silu_(gate).mul_(up);
  return gate;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets) {
  const Tensor chosen = logits.gather(1, targets.to(logits.device(), at::kLong).unsqueeze(1)).squeeze(1);
  return (at::logsumexp(logits, 1) - chosen).to(at::kCPU, at::kDouble);
}

Tensor row_attention(const RowAttentionInputs& in) {
  const int64_t num_heads = in.q.size(2);
  const Tensor q = in.q.transpose(1, 2);
  const auto attend = [&](const std::optional<Tensor>& mask, bool is_causal) {
    return at::scaled_dot_product_attention(q, head_major(in.k, num_heads), head_major(in.v, num_heads), mask, 0.0,
                                            is_causal, in.softmax_scale)
        .transpose(1, 2)
        .contiguous();
  };
  if (!in.window_begin.defined() && !in.far_begin.defined()) {  // plain causal attention, of which torch has fast ways
    if (in.q.size(1) == 1) return attend({}, false);
    if (in.num_carried == 0) return attend({}, true);
  }
  const Visible seen = visible(in);
  if (in.q_far.defined() && seen.far.defined()) return attention_with_far(in, seen);
  return attend(seen.far.defined() ? seen.window | seen.far : seen.window, false);
}

}  // namespace plain
}  // namespace sparsek::ops
