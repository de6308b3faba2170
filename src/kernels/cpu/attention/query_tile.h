// A tile of queries: the heads of a group stacked as rows, row = position * group_heads + head, and what each sees.
// Included by *.simd.cc files only.
#pragma once
#include "kernels/cpu/attention/keys.h"

namespace sparsek::cpu::SPARSEK_ISA {

inline constexpr float kMasked = -1e30f;   // the logit of an invisible key: 2^(kMasked - anything) is 0
inline constexpr float kNothing = -1e20f;  // the running maximum of a row that has seen no key

SPARSEK_INLINE VecI column_indices(int32_t first) {
  VecI index;
  for (int n = 0; n < kLanes; ++n) index[n] = n;
  return index + first;
}

struct QueryPosition {
  int32_t query;         // far keys: begin <= query < end
  int32_t window_begin;  // window rows: window_begin <= row <= own
  int32_t own;
  float tau;
};

// x of a key column that the query at `position` does not see becomes kMasked. column: first of kLanes of the panel.
template <class T>
SPARSEK_INLINE VecF mask(VecF x, const Keys<T>& keys, const PanelInfo& panel, int column,
                         const QueryPosition& position) {
  if (panel.is_far) {
    const VecI begin = load_i(keys.slot_begin + panel.first + column);
    const VecI end = load_i(keys.slot_end + panel.first + column);
    const VecI query = splat_i(position.query);
    return select((begin <= query) & (query < end), x, splat(kMasked));
  }
  const VecI row = column_indices(panel.first + column);
  return select((row >= splat_i(position.window_begin)) & (row <= splat_i(position.own)), x, splat(kMasked));
}

// clamp(u - tau, 0, 1) of kLanes slots.
template <class T>
SPARSEK_INLINE VecF gate(const Keys<T>& keys, const PanelInfo& panel, int column, float tau) {
  return min(max(load(keys.slot_score + panel.first + column) - tau, splat(0.0f)), splat(1.0f));
}

// Copies rows [queries][group_heads][head_dim] from a strided tensor; `from` is the first query's first head.
template <class T>
SPARSEK_INLINE void gather_rows(const T* from, int64_t stride_seq, int64_t stride_head, int queries, int group_heads,
                                int head_dim, T* to) {
  for (int i = 0; i < queries; ++i) {
    for (int g = 0; g < group_heads; ++g) {
      std::memcpy(to, from + i * stride_seq + g * stride_head, static_cast<size_t>(head_dim) * sizeof(T));
      to += head_dim;
    }
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
