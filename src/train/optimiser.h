// AdamW over groups of parameters with a learning rate and weight decay of their own, warm-up and cosine, clipping, and
// steps that are left out when a gradient is not finite.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "train/config.h"
#include "train/parameters.h"

namespace sparsek::train {

// Linear from 0 in warmup_steps, then a half cosine down to min_lr_ratio at `steps`. Step counts from 0.
double rate_factor(const OptimiserOptions& options, int64_t step, int64_t steps);

class Optimiser {
 public:
  // Takes the parameters that require a gradient; they are updated in place. Slopes stay in 0 to `largest_slope`; below
  // 0 it is no limit.
  Optimiser(Parameters& parameters, const OptimiserOptions& options, int64_t steps, double largest_slope = -1);

  struct Step {
    bool was_applied = false;  // false: the loss or a gradient was not finite; nothing changed
    double gradient_norm = 0;  // before clipping
    double rate = 0;           // of the matrices
  };
  // Applies the gradients of step number `step`, and forgets them.
  Step apply(int64_t step, bool loss_is_finite);

  int64_t num_parameters() const;  // elements
  // Names and tensors that a checkpoint has to keep: parameters, moments.
  std::vector<std::pair<std::string, at::Tensor>> tensors() const;
  int64_t num_applied() const { return num_applied_; }
  void set_num_applied(int64_t steps);

 private:
  struct GroupState {
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters, first, second, steps;
    double rate, weight_decay;
  };
  OptimiserOptions options_;
  int64_t total_steps_, num_applied_ = 0;
  std::vector<GroupState> groups_;
  std::vector<at::Tensor> slopes_;
  double largest_slope_;
};

}  // namespace sparsek::train
