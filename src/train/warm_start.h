// Before a run: scorers learn what the dense base does. Each layer's scores u are fitted to the logarithm of the mass
// that queries beyond the window give each key in the base's own attention, up to a constant a row and head.
#pragma once
#include <functional>
#include <string>

#include "train/batches.h"
#include "train/session.h"

namespace sparsek::train {

// log(1e-9 + mean over queries i >= j + window_size of sum over the group's heads of a_ij), float32 [batch, seqlen,
// num_kv_heads], and `counts` [seqlen]: how many such queries key j has in its row. Whole rows, dense causal attention;
// memory for `block` queries at a time.
struct FutureMass {
  at::Tensor log_mass, counts;
};
FutureMass future_mass(const AttentionInputs& in, int64_t window_size, int64_t block);

// Takes warm_start.steps batches from `batches`. False when should_stop() said so. The base must be there (teacher).
bool warm_start(Session& session, const TrainConfig& config, BatchSource& batches,
                const std::function<void(const std::string&)>& notice, const std::function<bool()>& should_stop);

}  // namespace sparsek::train
