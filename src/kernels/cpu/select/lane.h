// Prefix selection of one lane: a list of carried candidates, then arrivals one by one (eq. 4-6, fact a-c).
//
// A lane is one KV head of one document (select) or of one carried state (select_chunk). Time is counted in arrivals:
// "time t" is the state after arrivals 0..t. Sinks, windows, documents and strides of the outputs are the caller's.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cpu/select/rank.h"

namespace sparsek::cpu {

template <class T>
struct Lane {
  // Carried candidates by rank, finite, not more than pool_size of them; then the arrivals' scores.
  const T* carried = nullptr;
  int64_t num_carried = 0;
  const T* scores = nullptr;  // arrival a: scores[a * stride]
  int64_t stride = 1;
  int64_t num_arrivals = 0;

  // Results. Keys: carried rank r is key r, arrival a is key num_carried + a. Never: num_arrivals.
  T* tau = nullptr;               // [num_arrivals]
  int32_t* expiry = nullptr;      // [num_carried + num_arrivals] first time at or after its arrival without the key
  int32_t* frac_begin = nullptr;  // [num_carried + num_arrivals] first time with p < 1, and first with p = 0 or the key
  int32_t* frac_end = nullptr;    //   out of the pool; begin >= end: never fractional
  std::vector<Ranked<T>>
      final_pool;  // by rank, id = key. Unlimited pools keep what can still matter: at least topk + 1,
                   //   and every key with p > 0
};

// Fills the results of every lane, in parallel over lanes and stretches of a lane. pool_size 0: no limit. Returns
// false, with unspecified results, when an arrival's score is not finite.
template <class T>
bool select_lanes(std::span<Lane<T>> lanes, int64_t topk, int64_t pool_size);

extern template bool select_lanes(std::span<Lane<float>> lanes, int64_t topk, int64_t pool_size);
extern template bool select_lanes(std::span<Lane<double>> lanes, int64_t topk, int64_t pool_size);

}  // namespace sparsek::cpu
