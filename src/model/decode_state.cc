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

}  // namespace sparsek::model
