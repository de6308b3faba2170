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

// Which of kLanes key columns of a panel, from `column` on, the query at `position` sees.
template <class T>
SPARSEK_INLINE VecI visible(const Keys<T>& keys, const PanelInfo& panel, int column, const QueryPosition& position) {
  if (panel.is_far) {
    const VecI begin = load_i(keys.slot_begin + panel.first + column);
    const VecI end = load_i(keys.slot_end + panel.first + column);
    const VecI query = splat_i(position.query);
    return (begin <= query) & (query < end);
  }
  const VecI row = column_indices(panel.first + column);
  return (row >= splat_i(position.window_begin)) & (row <= splat_i(position.own));
}

// alpha * logit - shift of kLanes key columns of a panel, or kMasked. A register block that is finished at once
// computes the same bits: what a query gets must not depend on whether its tile needs masks.
template <class T>
SPARSEK_INLINE VecF scaled_logits(const float* logits, float alpha, VecF shift, const Keys<T>& keys,
                                  const PanelInfo& panel, int column, const QueryPosition& position) {
  const VecF x = load(logits + column) * alpha - shift;
  return panel.is_masked ? select(visible(keys, panel, column, position), x, splat(kMasked)) : x;
}

// The largest alpha * logit of a block of panels in one row.
template <class T>
SPARSEK_INLINE float block_maximum(const float* logits, float alpha, const Keys<T>& keys, int first_panel,
                                   int num_panels, const QueryPosition& position) {
  VecF top = splat(kMasked);
  for (int n = 0; n < num_panels; ++n) {
    const PanelInfo panel = keys.info[first_panel + n];
    for (int column = 0; column < kPanelKeys; column += kLanes) {
      top = max(top, scaled_logits(logits + n * kPanelKeys, alpha, splat(0.0f), keys, panel, column, position));
    }
  }
  return reduce_max(top);
}

// Where the block of panels that ends before `end` begins: at most max_panels, all far or all in the window, all masked
// or none. The tile's first block is its newest panels, which hold the own key of every row (a tile has 64 queries at
// most).
template <class T>
SPARSEK_INLINE int block_begin(const Keys<T>& keys, int end, int max_panels) {
  const PanelInfo last = keys.info[end - 1];
  const bool is_first = end == keys.num_panels;
  const int limit = is_first ? 64 / kPanelKeys : max_panels;
  int begin = end - 1;
  for (; begin > 0 && end - begin < limit; --begin) {
    const PanelInfo next = keys.info[begin - 1];
    if (next.is_far != last.is_far || (next.is_masked != last.is_masked && !is_first)) break;
  }
  return begin;
}

// The keys of one (batch row, KV head). Without soft gates no scores: then every weight is 1.
template <class T>
SPARSEK_INLINE KeySource<T> key_source(const AttentionFwdParams& p, const RunPlan& plan) {
  const int64_t lane = static_cast<int64_t>(plan.batch) * p.num_kv_heads + plan.kv_head;
  const auto at = [&](const void* base, const Strides& strides) {
    return static_cast<const T*>(base) + plan.batch * strides.batch + plan.kv_head * strides.head;
  };
  KeySource<T> source;
  source.k = at(p.k, p.k_strides);
  source.v = at(p.v, p.v_strides);
  source.k_far = p.k_far ? at(p.k_far, p.k_far_strides) : source.k;
  source.k_stride = p.k_strides.seq;
  source.v_stride = p.v_strides.seq;
  source.k_far_stride = p.k_far ? p.k_far_strides.seq : p.k_strides.seq;
  source.scores = p.gate == Gate::kSoft ? static_cast<const float*>(p.scores) + lane * p.seqlen_k : nullptr;
  source.far_begin = p.far_begin + lane * p.seqlen_k;
  source.far_end = p.far_end + lane * p.seqlen_k;
  source.num_carried = p.num_carried;
  return source;
}

// Asks for the query rows of the next tile a few at a time, while this one is computed: all at once they would wait for
// memory themselves.
template <class T>
struct RowPrefetch {
  SPARSEK_INLINE void some(int count) {
    for (; count > 0 && next < rows; ++next, --count) {
      prefetch_rows(from + next / group_heads * stride_seq + next % group_heads * stride_head, 0, 1, head_dim);
    }
  }
  const T* from;  // the next tile's first row
  int64_t stride_seq, stride_head;
  int rows, group_heads, head_dim;
  int next = 0;
};

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

// to = factor * from, rounded to the tensor's type.
SPARSEK_INLINE void write_row(float* to, const float* from, float factor, int head_dim) {
  for (int c = 0; c < head_dim; ++c) to[c] = from[c] * factor;
}
SPARSEK_INLINE void write_row(BFloat16* to, const float* from, float factor, int head_dim) {
  for (int c = 0; c < head_dim; ++c) to[c] = to_bf16(from[c] * factor);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
