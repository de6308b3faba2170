// The gated MLP of a layer: down(silu(gate(x)) * up(x)).
#pragma once
#include <ATen/core/Tensor.h>

#include "model/weights.h"

namespace sparsek::model {

// residual [tokens, dim] float32 += MLP(x); x [tokens, dim]; gate_up [tokens, 2 * ffn_dim] is scratch.
void mlp_add_(at::Tensor& residual, const at::Tensor& x, const LayerWeights& weights, at::Tensor& gate_up);

}  // namespace sparsek::model
