// Rotary position embedding: which angle a position has in which channel pair. Half-split pairs (c, c + head_dim / 2).
// Frequencies and angles are computed in double, the cosines and sines stored as float32.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace sparsek::model {

struct RotaryTable {
  at::Tensor cos, sin;  // float32 [positions, head_dim / 2]
};

class Rope {
 public:
  // far_distance > 0: the constant rotation R(D) of eq. 9 is prepared too.
  Rope(const RopeConfig& config, int64_t head_dim, int64_t far_distance);

  // Angles of positions first .. first + count - 1.
  RotaryTable table(int64_t first, int64_t count) const;
  // Row R(far_distance), [1, head_dim / 2]; undefined tensors without.
  const RotaryTable& far() const { return far_; }
  const std::vector<double>& inverse_frequencies() const { return inverse_frequencies_; }

 private:
  std::vector<double> inverse_frequencies_;
  RotaryTable far_;
};

// [head_dim / 2] radians per position, scaling applied.
std::vector<double> inverse_frequencies(const RopeConfig& config, int64_t head_dim);

}  // namespace sparsek::model
