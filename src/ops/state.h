// The carried state's checks and the index arithmetic that attention_chunk and window_mass_chunk share (section 6).
#pragma once
#include "ops/checks.h"

namespace sparsek::ops {

inline constexpr double kFloor = 1e-9;  // inside the logarithm of eq. 1b
// How many queries [j + ceil(w/2), j + w - 1] the mean of eq. 1b is over; where there is none (w = 1) the mass is 0.
inline int64_t num_mass_queries(int64_t window_size) {
  return std::max<int64_t>(window_size / 2, 1);
}

// A state's tensors as operations take them; absent ones are null.
struct StateArguments {
  const Tensor& k;
  const Tensor* v = nullptr;
  const MaybeTensor& ring_k;
  const Tensor* ring_scores = nullptr;
  const Tensor* ring_mass = nullptr;
  const Tensor* slot_scores = nullptr;
  const Tensor* slot_positions = nullptr;
  const Tensor* pool_scores = nullptr;
  const Tensor& lengths;
};
// Checks every tensor given against q's and k's sizes. topk is taken from k when it is negative; pool_size 0 accepts
// any capacity.
void check_state(const StateArguments& state, const Tensor& q, const Tensor& k, bool far_rotary, int64_t topk,
                 int64_t window_size, int64_t num_sinks, int64_t pool_size);

// [batch, window_size] int64: the ring row that holds position length - window_size + r.
Tensor ring_order(const Tensor& lengths, int64_t window_size);
// [batch, num_kv_heads, window_size] of ring values, into position order.
Tensor ring_in_order(const Tensor& ring, const Tensor& order);
// values [batch, num_kv_heads, window_size + chunk] in position order -> the new ring of their last window_size.
Tensor new_ring(const Tensor& values, const Tensor& lengths, const c10::SymInt& chunk, int64_t window_size);
// Rows of head_dim: rows is [a, b, c, head_dim], source flat indices into a * b * c, of any shape [d, e, f] -> [d, e,
// f, head_dim].
Tensor take_rows(const Tensor& rows, const Tensor& source);
// state [batch, num_kv_heads, rows, head_dim], index [batch, n] into its rows -> [batch, n, num_kv_heads, head_dim].
Tensor take_rows_of_every_head(const Tensor& state, const Tensor& index);

}  // namespace sparsek::ops
