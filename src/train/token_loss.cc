#include "train/token_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

namespace sparsek::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::ScalarType sum_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct Inputs {
  const at::Tensor &hidden, &output, &targets;
};

// Calls block(first, count, log_probabilities [count, vocab_size], targets, valid) for each block of rows.
template <class Block>
void for_each_block(const Inputs& in, int64_t rows, Block block) {
  const at::Tensor output = in.output.to(in.hidden.scalar_type());
  for (int64_t first = 0; first < in.hidden.size(0); first += rows) {
    const int64_t count = std::min(rows, in.hidden.size(0) - first);
    const at::Tensor logits = at::linear(in.hidden.narrow(0, first, count), output);
    const at::Tensor targets = in.targets.narrow(0, first, count);
    block(first, count, at::log_softmax(logits, -1, sum_dtype(in.hidden)), targets, targets.ne(kIgnored));
  }
}

at::Tensor picked(const at::Tensor& log_probabilities, const at::Tensor& targets, const at::Tensor& valid) {
  const at::Tensor chosen = log_probabilities.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1);
  return at::where(valid, -chosen, at::zeros_like(chosen));
}

struct TokenLossFunction : torch::autograd::Function<TokenLossFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& output,
                               const at::Tensor& targets, const std::optional<at::Tensor>& teacher_hidden,
                               const std::optional<at::Tensor>& teacher_output, double next_token_weight,
                               double kl_weight, int64_t rows, bool has_gradient) {
    const at::ScalarType dtype = hidden.scalar_type();
    const auto options = hidden.options().dtype(sum_dtype(hidden));
    const bool needs_hidden = has_gradient && hidden.requires_grad();
    const bool needs_output = has_gradient && output.requires_grad();
    const at::NoGradGuard no_grad;
    at::Tensor next_token = at::zeros({}, options), kl = at::zeros({}, options);
    at::Tensor dhidden, doutput;
    if (needs_hidden) dhidden = at::empty(hidden.sizes(), hidden.options());
    if (needs_output) doutput = at::zeros(output.sizes(), output.options());
    const at::Tensor weights = needs_hidden ? output.to(dtype) : at::Tensor();
    at::Tensor teacher_weights;
    if (teacher_hidden) teacher_weights = teacher_output->to(teacher_hidden->scalar_type());
    for_each_block(
        {hidden, output, targets}, rows,
        [&](int64_t first, int64_t count, const at::Tensor& log_p, const at::Tensor& wanted, const at::Tensor& valid) {
          next_token += picked(log_p, wanted, valid).sum();
          at::Tensor log_teacher;
          if (teacher_hidden) {
            log_teacher = at::log_softmax(at::linear(teacher_hidden->narrow(0, first, count), teacher_weights), -1,
                                          log_p.scalar_type());
            const at::Tensor divergence = (log_teacher.exp() * (log_teacher - log_p)).sum(-1);
            kl += at::where(valid, divergence, at::zeros_like(divergence)).sum();
          }
          if (!needs_hidden && !needs_output) return;
          // d cross-entropy = p - onehot(target), d KL(teacher || p) = p - p_teacher.
          at::Tensor dlogits = log_p.exp() * (next_token_weight + (teacher_hidden ? kl_weight : 0));
          if (next_token_weight != 0) {
            const at::Tensor index = wanted.clamp_min(0).unsqueeze(1);
            dlogits.scatter_add_(1, index, at::zeros_like(index, log_p.options()).fill_(-next_token_weight));
          }
          if (log_teacher.defined()) dlogits -= log_teacher.exp_().mul_(kl_weight);
          dlogits = (dlogits * valid.unsqueeze(1)).to(dtype);
          if (needs_hidden) dhidden.narrow(0, first, count).copy_(at::matmul(dlogits, weights));
          if (needs_output) doutput += at::matmul(dlogits.t(), hidden.narrow(0, first, count));
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
  for_each_block(
      {hidden, output, targets}, rows,
      [&](int64_t first, int64_t count, const at::Tensor& log_p, const at::Tensor& wanted, const at::Tensor& valid) {
        scores.losses.narrow(0, first, count).copy_(picked(log_p, wanted, valid));
        scores.hits.narrow(0, first, count).copy_(log_p.argmax(1).eq(wanted).logical_and_(valid));
      });
  return scores;
}

}  // namespace sparsek::train
