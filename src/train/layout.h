// Where the tokens of a batch stand in their documents, and the rotary angles that follow.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "model/rope.h"

namespace sparsek::train {

struct Layout {
  int64_t batch = 0, seqlen = 0;
  std::vector<int32_t> document_ends;    // of a packed row (batch 1): ends of its documents; empty: one document a row
  std::vector<int64_t> positions;        // [batch] tokens that each row's document had before; empty: 0
  std::optional<at::Tensor> cu_seqlens;  // int32 [documents + 1] on the device, of a packed row
  at::Tensor cos, sin;                   // [1 or batch, seqlen, 1, head_dim / 2]
  at::Tensor far_cos, far_sin;           // [1, 1, 1, head_dim / 2]: R(D) of eq. 9; undefined without
};

// `dtype`: of the angles' cosines and sines, float32 or float64.
Layout make_layout(const model::Rope& rope, int64_t batch, int64_t seqlen, std::vector<int32_t> document_ends,
                   std::vector<int64_t> positions, at::Device device, at::ScalarType dtype);

}  // namespace sparsek::train
