// An adapter's scorer in the form its operations read: raw scores r of eq. 1 without the delayed part.
#pragma once
#include <ATen/core/Tensor.h>

#include "model/adapter.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {

class Scorer {
 public:
  explicit Scorer(const LayerScorer& weights);
  // x [tokens, dim] -> float32 [1, tokens, num_kv_heads].
  at::Tensor operator()(const at::Tensor& x) const;

  double alpha = 0;
  at::Tensor beta, gamma, slope;  // [num_kv_heads]

 private:
  ops::PackedLinear hidden_;  // undefined when linear
  ops::PackedLinear output_;
};

}  // namespace sparsek::model
