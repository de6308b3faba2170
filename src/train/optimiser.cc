#include "train/optimiser.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sparsek::train {

double rate_factor(const OptimiserOptions& options, int64_t step, int64_t steps) {
  if (step < options.warmup_steps) return static_cast<double>(step + 1) / static_cast<double>(options.warmup_steps);
  const int64_t falling = std::max<int64_t>(steps - options.warmup_steps, 1);
  const double done = std::min(static_cast<double>(step - options.warmup_steps) / static_cast<double>(falling), 1.0);
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine;
}

Optimiser::Optimiser(Parameters& parameters, const OptimiserOptions& options, int64_t steps, double largest_slope)
    : options_(options), total_steps_(steps), largest_slope_(largest_slope) {
  groups_.resize(kNumGroups);
  for (GroupState& group : groups_) {
    group.rate = options.lr;
    group.weight_decay = 0;
  }
  groups_[static_cast<size_t>(Group::kMatrix)].weight_decay = options.weight_decay;
  groups_[static_cast<size_t>(Group::kScorer)].rate = options.scorer_lr;
  groups_[static_cast<size_t>(Group::kScale)].rate = options.scale_lr < 0 ? options.scorer_lr : options.scale_lr;
  visit_parameters(parameters, [&](const std::string& name, at::Tensor& tensor, Group kind) {
    if (!tensor.requires_grad()) return;
    GroupState& group = groups_[static_cast<size_t>(kind)];
    group.names.push_back(name);
    group.parameters.push_back(tensor);
    const at::NoGradGuard no_grad;
    group.first.push_back(at::zeros_like(tensor));
    group.second.push_back(at::zeros_like(tensor));
    // One number for all: only read by the update, and written once a step.
    group.steps.push_back(group.steps.empty() ? at::zeros({}, tensor.options().dtype(at::kFloat)) : group.steps[0]);
    if (name.ends_with(".slope")) slopes_.push_back(tensor);
  });
}

Optimiser::Step Optimiser::apply(int64_t step, bool loss_is_finite) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;
  std::vector<std::vector<at::Tensor>> gradients(groups_.size());
  for (size_t g = 0; g < groups_.size(); ++g) {
    for (at::Tensor& parameter : groups_[g].parameters) {
      // A parameter that the loss did not reach counts as one with gradient 0.
      gradients[g].push_back(parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter));
      parameter.mutable_grad() = at::Tensor();
    }
    if (gradients[g].empty()) continue;
    for (const at::Tensor& norm : at::_foreach_norm(gradients[g], 2)) norms.push_back(norm);
  }
  Step result;
  const double factor = rate_factor(options_, step, total_steps_);
  result.rate = options_.lr * factor;
  result.gradient_norm = norms.empty() ? 0 : at::linalg_vector_norm(at::stack(norms)).item<double>();
  if (!loss_is_finite || !std::isfinite(result.gradient_norm)) return result;

  const double clip = options_.clip > 0 ? std::min(1.0, options_.clip / (result.gradient_norm + 1e-6)) : 1.0;
  ++num_applied_;
  for (size_t g = 0; g < groups_.size(); ++g) {
    GroupState& group = groups_[g];
    if (group.parameters.empty()) continue;
    if (clip < 1) at::_foreach_mul_(gradients[g], clip);
    group.steps[0].fill_(static_cast<double>(num_applied_));
    at::_fused_adamw_(group.parameters, gradients[g], group.first, group.second, {}, group.steps, group.rate * factor,
                      options_.beta1, options_.beta2, group.weight_decay, options_.eps, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
  for (at::Tensor& slope : slopes_) clamp_slope(slope, largest_slope_);
  result.was_applied = true;
  return result;
}

int64_t Optimiser::num_parameters() const {
  int64_t sum = 0;
  for (const GroupState& group : groups_) {
    for (const at::Tensor& parameter : group.parameters) sum += parameter.numel();
  }
  return sum;
}

std::vector<std::pair<std::string, at::Tensor>> Optimiser::tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> all;
  for (const GroupState& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      all.emplace_back("parameter." + group.names[i], group.parameters[i].detach());
      all.emplace_back("first_moment." + group.names[i], group.first[i]);
      all.emplace_back("second_moment." + group.names[i], group.second[i]);
    }
  }
  return all;
}

void Optimiser::set_num_applied(int64_t steps) {
  num_applied_ = steps;
}

}  // namespace sparsek::train
