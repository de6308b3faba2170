// Scorers in the form their operations read.
#pragma once
#include <ATen/core/Tensor.h>

#include "model/adapter.h"
#include "model/placement.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {

// What eq. 1 makes of raw scores, apart from their statistics.
struct ScoreScale {
  at::Tensor beta, gamma, slope;  // [num_kv_heads]
};

// u = r + slope * j / 1024: the untrained scorers', with timestep normalisation off.
ScoreScale untrained_scale(int64_t num_kv_heads, double slope, const Placement& placement);

// An adapter's scorer: raw scores r of eq. 1 without the delayed part.
class Scorer {
 public:
  Scorer(const LayerScorer& weights, const Placement& placement);
  // x [tokens, dim] -> float32 [1, tokens, num_kv_heads].
  at::Tensor operator()(const at::Tensor& x) const;

  double alpha = 0;
  ScoreScale scale;

 private:
  ops::PackedLinear hidden_;  // undefined when linear
  ops::PackedLinear output_;
};

}  // namespace sparsek::model
