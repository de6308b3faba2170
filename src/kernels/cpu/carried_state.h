// How much of a carried state (section 6) its length says is in use. A state that disagrees, for instance one whose
// lengths alone were set back to zero, would be indexed past its slots; one with scores that are not ordered (NaN)
// would be merged past its pool.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/error.h"

namespace sparsek::cpu {

struct CarriedSizes {
  int32_t topk, window_size, num_sinks, pool_size;  // pool_size 0: no limit
};

// The number of pool scores in use. Throws unless slots and pool of one (batch row, KV head) hold what `length` tokens
// leave; a pool without limit may have dropped scores that will never matter again, down to topk.
template <class Score>
int64_t check_carried_state(const Score* slot_scores, const int64_t* slot_positions, const Score* pool_scores,
                            int64_t pool_capacity, int64_t length, const CarriedSizes& sizes, int64_t batch_row,
                            int64_t kv_head) {
  constexpr Score kLargest = std::numeric_limits<Score>::max();
  // No early exit, so that these loops use vectors.
  bool is_ordered = pool_capacity == 0 || pool_scores[0] <= kLargest;
  for (int64_t r = 1; r < pool_capacity; ++r) is_ordered &= pool_scores[r - 1] >= pool_scores[r];
  if (!is_ordered) {
    throw_data("pool_scores must be finite (-inf where unused) and descend, but do not in batch row {}, KV head {}",
               batch_row, kv_head);
  }
  bool is_finite = true;
  for (int64_t s = 0; s < sizes.topk; ++s) {  // an empty slot may hold anything
    is_finite &= (slot_positions[s] < 0) | ((slot_scores[s] >= -kLargest) & (slot_scores[s] <= kLargest));
  }
  if (!is_finite) throw_data("slot_scores must be finite, but are not in batch row {}, KV head {}", batch_row, kv_head);
  constexpr Score kUnused = -std::numeric_limits<Score>::infinity();
  const int64_t candidates = std::max<int64_t>(0, length - sizes.window_size - sizes.num_sinks);
  const int64_t wanted_slots = std::min<int64_t>(candidates, sizes.topk);
  const int64_t most_scores = sizes.pool_size > 0 ? std::min<int64_t>(candidates, sizes.pool_size) : candidates;
  const int64_t least_scores = sizes.pool_size > 0 ? most_scores : wanted_slots;
  const int64_t slots =
      std::count_if(slot_positions, slot_positions + sizes.topk, [](int64_t position) { return position >= 0; });
  if (slots != wanted_slots) {
    throw_data(
        "a state of {} tokens must hold {} selected keys, found {} in batch row {}, KV head {}; start with a new state "
        "instead of changing lengths",
        length, wanted_slots, slots, batch_row, kv_head);
  }
  const Score* const pool_end =
      std::partition_point(pool_scores, pool_scores + pool_capacity, [](Score u) { return u > kUnused; });
  const int64_t scores = pool_end - pool_scores;
  if (scores < least_scores || scores > most_scores) {
    throw_data(
        "a state of {} tokens must hold {} pool scores, found {} in batch row {}, KV head {}; start with a new state "
        "instead of changing lengths",
        length, most_scores, scores, batch_row, kv_head);
  }
  return scores;
}

}  // namespace sparsek::cpu
