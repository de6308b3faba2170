#include "model/mlp.h"

#include "ops/transformer_ops.h"

namespace sparsek::model {

void mlp_add_(at::Tensor& residual, const at::Tensor& x, const LayerWeights& weights, at::Tensor& gate_up) {
  ops::linear_out(x, weights.gate_up, gate_up);
  const at::Tensor activated = ops::swiglu_(gate_up);
  ops::linear_add_(residual, activated, weights.down);
}

}  // namespace sparsek::model
