// What a model carries from chunk to chunk and token to token: one LayerState a layer and the number of tokens read.
// Of fixed size for the kinds window and sparsek; the dense kind's cache grows with the document. Usually of one
// document; Transformer::join() puts several side by side.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/ops.h"

namespace sparsek::model {

struct LayerState {
  ops::AttentionState sparsek;  // kind sparsek; batch rows are documents
  // [num_kv_heads, rows, head_dim]. Kind dense: rows are positions, capacity >= length. Kind window: num_sinks sinks |
  // window_size ring rows (position p at p % window_size), with far rotary the sinks' keys un-rotated.
  at::Tensor k, v;
};

struct RepeatedStep;  // transformer.cc

class DecodeState {
 public:
  int64_t documents() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t length() const;         // tokens read; of several documents those of the shortest
  int64_t size_in_bytes() const;  // of all layers' tensors as they are now
  DecodeState copy() const;       // shares nothing: both go on from here, each its own way

 private:
  friend class Transformer;
  std::vector<LayerState> layers_;
  std::shared_ptr<RepeatedStep> step_;  // of single tokens, once there was one; null after a chunk
  std::vector<int64_t> lengths_ = {0};  // tokens read of each document
};

}  // namespace sparsek::model
