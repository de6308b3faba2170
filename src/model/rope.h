// Rotary position embedding: which angle a position has in which channel pair. Half-split pairs (c, c + head_dim / 2).
// Frequencies and angles are computed in double, the cosines and sines stored as float32.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/placement.h"

namespace sparsek::model {

struct RotaryTable {
  at::Tensor cos, sin;  // float32, a row a position, as ops::rotary_out reads them
};

class Rope {
 public:
  // far_distance > 0: the constant rotation R(D) of eq. 9 is prepared too.
  Rope(const RopeConfig& config, int64_t head_dim, int64_t far_distance, const Placement& placement = {});

  // Angles of positions first .. first + count - 1.
  RotaryTable table(int64_t first, int64_t count) const;
  // Of positions that only the device knows, int64 [count]. Plain operations only.
  RotaryTable table(const at::Tensor& positions) const;
  // The row R(far_distance); undefined tensors without.
  const RotaryTable& far() const { return far_; }
  const std::vector<double>& inverse_frequencies() const { return inverse_frequencies_; }

 private:
  std::vector<double> inverse_frequencies_;
  at::Tensor plain_frequencies_;  // the same on the device; undefined without plain operations
  RotaryTable far_;
};

// [head_dim / 2] radians per position, scaling applied.
std::vector<double> inverse_frequencies(const RopeConfig& config, int64_t head_dim);

}  // namespace sparsek::model
