#include "model/rope.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <numbers>

#include "ops/transformer_ops.h"

namespace sparsek::model {
namespace {

// Llama 3: wavelengths beyond the trained context are stretched by `factor`, short ones kept, those between blended.
double llama3_frequency(const RopeConfig& config, double frequency) {
  const double turns = config.original_context_length * frequency / (2 * std::numbers::pi);  // over the trained context
  if (turns < config.low_freq_factor) return frequency / config.factor;
  if (turns > config.high_freq_factor) return frequency;
  const double kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
  return (1 - kept) * frequency / config.factor + kept * frequency;
}

}  // namespace

std::vector<double> inverse_frequencies(const RopeConfig& config, int64_t head_dim) {
  std::vector<double> frequencies(head_dim / 2);
  for (int64_t c = 0; c < head_dim / 2; ++c) {
    double frequency = std::pow(config.theta, -2.0 * static_cast<double>(c) / static_cast<double>(head_dim));
    if (config.scaling == RopeScaling::kLinear) frequency /= config.factor;
    if (config.scaling == RopeScaling::kLlama3) frequency = llama3_frequency(config, frequency);
    if (!config.frequency_divisors.empty()) frequency /= config.frequency_divisors[c];
    frequencies[c] = frequency;
  }
  return frequencies;
}

Rope::Rope(const RopeConfig& config, int64_t head_dim, int64_t far_distance, const Placement& placement)
    : inverse_frequencies_(model::inverse_frequencies(config, head_dim)) {
  if (placement.plain) plain_frequencies_ = at::tensor(inverse_frequencies_, at::kDouble).to(placement.device);
  if (far_distance > 0) far_ = table(far_distance, 1);
}

RotaryTable Rope::table(int64_t first, int64_t count) const {
  if (plain_frequencies_.defined()) {
    return table(at::arange(first, first + count, plain_frequencies_.options().dtype(at::kLong)));
  }
  auto [cos, sin] = ops::rotary_table(first, count, inverse_frequencies_);
  return {cos, sin};
}

RotaryTable Rope::table(const at::Tensor& positions) const {
  auto [cos, sin] = ops::plain_rotary_table(positions, plain_frequencies_);
  return {cos, sin};
}

}  // namespace sparsek::model
