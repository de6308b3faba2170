// Which heads does a dense model look things up with? Few do: they find where a token stood before (duplicate-token
// heads: Wang et al., arXiv 2211.00593). What they need may be old, while a position slope that is learned from text,
// where what repeats mostly repeats soon, lets old keys go first. Heads that copy what came behind such a place
// (induction heads) would be found by the same means, but keep what they need with the slopes that they learn
// (docs/decisions/training.md).
#pragma once
#include <cstdint>
#include <vector>

#include "train/network.h"

namespace sparsek::train {

// float32 [num_layers, num_kv_heads] on the CPU, 0 to 1: where `text` (int64 [tokens], at least 1, of any kind that the
// model knows) comes twice, the mean attention that a token of the second time pays itself of the first time; of a
// group's heads the one that pays most. `dense` has dense attention.
at::Tensor lookup_scores(const Network& dense, const at::Tensor& text);

struct HeadIndex {
  int64_t layer, kv_head;
};
// The `count` highest of scores [num_layers, num_kv_heads], highest first; of equals the first.
std::vector<HeadIndex> highest_heads(const at::Tensor& scores, int64_t count);

// Sets the slopes of these heads to `value`, where they stay: no gradient reaches them.
void hold_slopes(Parameters& parameters, const std::vector<HeadIndex>& heads, double value);

}  // namespace sparsek::train
