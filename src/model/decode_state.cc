#include "model/decode_state.h"

#include <algorithm>

namespace sparsek::model {

int64_t DecodeState::length() const {
  return *std::min_element(lengths_.begin(), lengths_.end());
}

int64_t DecodeState::size_in_bytes() const {
  int64_t sum = 0;
  for (const LayerState& layer : layers_) {
    if (layer.k.defined()) {
      sum += static_cast<int64_t>(layer.k.nbytes() + layer.v.nbytes());
    } else {
      sum += ops::size_in_bytes(layer.sparsek);
    }
  }
  return sum;
}

DecodeState DecodeState::copy() const {
  DecodeState copy;
  copy.lengths_ = lengths_;
  for (const LayerState& layer : layers_) {
    LayerState& own = copy.layers_.emplace_back(layer);
    ops::AttentionState& state = own.sparsek;
    for (at::Tensor* tensor :
         {&own.k, &own.v, &state.k, &state.v, &state.ring_k, &state.ring_scores, &state.ring_mass, &state.slot_scores,
          &state.slot_positions, &state.pool_scores, &state.stats, &state.lengths}) {
      if (tensor->defined()) *tensor = tensor->clone();
    }
  }
  return copy;
}

}  // namespace sparsek::model
