#include "train/token_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

#include "ops/layer_ops.h"

namespace sparsek::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType sum_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls block(first, count, logits [count, vocab_size]) for each block of rows; the logits are the block's to change.
template <class Block>
void for_each_block(const at::Tensor& hidden, const at::Tensor& output, int64_t rows, Block block) {
  for (int64_t first = 0; first < hidden.size(0); first += rows) {
    const int64_t count = std::min(rows, hidden.size(0) - first);
    at::Tensor logits = at::linear(hidden.narrow(0, first, count), output);
    block(first, count, logits);
  }
}

// sum += a^T b, in float32 where a GPU's products are of a half type.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (a.is_cuda() && sum.scalar_type() != a.scalar_type()) {
    at::addmm_out(sum, sum, a.t(), b, sum.scalar_type());
  } else {
    sum += at::matmul(a.t(), b);
  }
}

struct TokenLossFunction : torch::autograd::Function<TokenLossFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& output,
                               const at::Tensor& targets, const std::optional<at::Tensor>& teacher_hidden,
                               const std::optional<at::Tensor>& teacher_output, double next_token_weight,
                               double kl_weight, int64_t rows, bool has_gradient) {
    const at::ScalarType dtype = hidden.scalar_type();
    const auto sums = hidden.options().dtype(sum_dtype(hidden));
    const bool needs_hidden = has_gradient && hidden.requires_grad();
    const bool needs_output = has_gradient && output.requires_grad();
    const at::NoGradGuard no_grad;
    at::Tensor next_token = at::zeros({}, sums), kl = at::zeros({}, sums);
    at::Tensor dhidden, doutput;
    if (needs_hidden) dhidden = at::empty(hidden.sizes(), hidden.options());
    if (needs_output) doutput = at::zeros(output.sizes(), output.options());
    const at::Tensor weights = output.to(dtype);
    at::Tensor teacher_weights;
    if (teacher_hidden) teacher_weights = teacher_output->to(teacher_hidden->scalar_type());
    const ops::CrossEntropyOptions options{.ignored = kIgnored,
                                           .next_token_weight = next_token_weight,
                                           .kl_weight = kl_weight,
                                           .writes_gradient = needs_hidden || needs_output};
    for_each_block(hidden, weights, rows, [&](int64_t first, int64_t count, at::Tensor& logits) {
      ops::MaybeTensor teacher;
      if (teacher_hidden) teacher = at::linear(teacher_hidden->narrow(0, first, count), teacher_weights);
      const auto [losses, divergences] = ops::cross_entropy_(logits, targets.narrow(0, first, count), teacher, options);
      next_token += losses.sum();
      if (teacher_hidden) kl += divergences.sum();
      if (needs_hidden) {
        at::Tensor part = dhidden.narrow(0, first, count);
        at::mm_out(part, logits, weights);
      }
      if (needs_output) add_product(doutput, logits, hidden.narrow(0, first, count));
    });
    const at::Tensor total = next_token * next_token_weight + kl * kl_weight;
    ctx->save_for_backward({dhidden, doutput});
    ctx->mark_non_differentiable({next_token, kl});
    return {total, next_token, kl};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto scaled = [&](const at::Tensor& gradient) {
      return gradient.defined() ? gradient * gradients[0].to(gradient.scalar_type()) : at::Tensor();
    };
    return {scaled(saved[0]), scaled(saved[1]), {}, {}, {}, {}, {}, {}, {}};
  }
};

}  // namespace

TokenLoss token_loss(const at::Tensor& hidden, const at::Tensor& output, const at::Tensor& targets,
                     const LossWeights& weights, const Teacher& teacher) {
  // apply() takes no undefined tensors.
  const auto given = [](const at::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; };
  const variable_list out =
      TokenLossFunction::apply(hidden, output, targets, given(teacher.hidden), given(teacher.output),
                               weights.next_token, weights.kl, weights.rows, at::GradMode::is_enabled());
  return {out[0], out[1], out[2]};
}

TokenScores token_scores(const at::Tensor& hidden, const at::Tensor& output, const at::Tensor& targets, int64_t rows) {
  const at::NoGradGuard no_grad;
  TokenScores scores{at::empty({hidden.size(0)}, hidden.options().dtype(sum_dtype(hidden))),
                     at::empty({hidden.size(0)}, hidden.options().dtype(at::kBool))};
  for_each_block(hidden, output.to(hidden.scalar_type()), rows, [&](int64_t first, int64_t count, at::Tensor& logits) {
    const at::Tensor wanted = targets.narrow(0, first, count);
    scores.losses.narrow(0, first, count).copy_(ops::cross_entropy_(logits, wanted, {}, {.ignored = kIgnored}).losses);
    scores.hits.narrow(0, first, count).copy_(logits.argmax(1).eq(wanted).logical_and_(wanted.ne(kIgnored)));
  });
  return scores;
}

}  // namespace sparsek::train
