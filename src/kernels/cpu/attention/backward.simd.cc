// Section 5 for one run of query tiles, float32 and bfloat16. With P recomputed from softmax_lse:
//   dP = dO V^T,  dS = P (g dP - delta + dlse),  dV += (P g)^T dO,  dK += dS^T Q,  dQ += dS K,
// and h = P dP summed over the queries at which a far key is fractional (eq. 10). The sums over keys of every query's h
// go to `h_sums`; eq. 11 itself is score_gradient.cc.
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/query_tile.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kBlockPanels = 2;
constexpr int kBlockKeys = kBlockPanels * kPanelKeys;

// Rows of a tile in the two layouts of tile.h: as A (one row after the other) and as a panel of rows. In float32 they
// are one.
template <class T>
struct TileRows {
  TileRows() = default;
  TileRows(Arena* arena, int rows, int head_dim_) : head_dim(head_dim_) {
    panel = arena->take<T>(rows * padded(head_dim));
    plain = sizeof(T) == 2 ? arena->take<T>(rows * head_dim) : panel;
    stride = sizeof(T) == 2 ? head_dim : padded(head_dim);
    panel_bytes = static_cast<size_t>(rows) * static_cast<size_t>(padded(head_dim)) * sizeof(T);
  }
  void clear() const { std::memset(panel, 0, panel_bytes); }
  SPARSEK_INLINE void set(int row, const T* from) const {
    pack_row(panel, row, from, head_dim);
    if (sizeof(T) == 2) std::memcpy(plain + row * stride, from, static_cast<size_t>(head_dim) * sizeof(T));
  }
  T *plain = nullptr, *panel = nullptr;
  int64_t stride = 0;
  size_t panel_bytes = 0;
  int head_dim = 0;
};

struct RowState {
  QueryPosition position;
  float lse_log2;  // +1e20 for a row that sees nothing: P is 0
  float shift;     // delta - dlse
};

template <class T>
struct Scratch {
  Scratch(Arena* arena, const AttentionBwdParams& p, const RunPlan& plan)
      : group_heads(p.fwd.num_heads / p.fwd.num_kv_heads), max_rows((plan.tile_queries * group_heads + 1) / 2 * 2) {
    const int head_dim = p.fwd.head_dim, padded_dim = padded(head_dim);
    q = TileRows<T>(arena, max_rows, head_dim);
    q_far = p.fwd.q_far ? TileRows<T>(arena, max_rows, head_dim) : q;
    dout = TileRows<T>(arena, max_rows, head_dim);
    dq = arena->take<float>(max_rows * padded_dim);
    dq_far = p.fwd.q_far ? arena->take<float>(max_rows * padded_dim) : dq;
    rows = arena->take<RowState>(max_rows);
    h_rows = arena->take<float>(max_rows * kLanes);
    logits = arena->take<float>(max_rows * kBlockKeys);
    dp = arena->take<float>(max_rows * kBlockKeys);
    p_transposed = sizeof(T) == 2 ? arena->take<T>(max_rows * kBlockKeys) : reinterpret_cast<T*>(logits);
    ds_transposed = sizeof(T) == 2 ? arena->take<T>(max_rows * kBlockKeys) : reinterpret_cast<T*>(dp);
    ds = sizeof(T) == 2 ? arena->take<T>(max_rows * kBlockKeys) : ds_transposed;
    h_columns = arena->take<float>(kBlockKeys);
    slot_dk = arena->take<float>(plan.max_slots * padded_dim);
    slot_dv = arena->take<float>(plan.max_slots * padded_dim);
    slot_h = arena->take<double>(plan.max_slots);
    slot_arrival = arena->take<int32_t>(plan.max_slots);
    slot_frac_begin = arena->take<int32_t>(plan.max_slots);
    slot_frac_end = arena->take<int32_t>(plan.max_slots);
  }
  int group_heads, max_rows;
  TileRows<T> q, q_far, dout;
  float *dq, *dq_far;  // [rows][padded_dim] without softmax_scale
  RowState* rows;
  float* h_rows;                    // [rows][kLanes] partial sums of h
  float *logits, *dp;               // [rows][kBlockKeys]; in float32 they become P g and dS
  T *p_transposed, *ds_transposed;  // bfloat16: [rows / 2][kBlockKeys][2]
  T* ds;                            // [rows][kBlockKeys]
  float* h_columns;                 // [kBlockKeys] of one tile
  float *slot_dk, *slot_dv;         // [max_slots][padded_dim]
  double* slot_h;
  int32_t *slot_arrival, *slot_frac_begin, *slot_frac_end;  // slot_arrival -1: nothing to hand over
};

// Two rows of bfloat16 side by side: [key][row].
SPARSEK_INLINE void store_interleaved(BFloat16* to, VecF first, VecF second) {
#if defined(SPARSEK_ISA_AVX512)
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  const VecU a = (VecU)first, b = (VecU)second;
  const VecU pairs = ((a + 0x7fffu + ((a >> 16) & 1u)) >> 16) | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
#endif
  std::memcpy(to, &pairs, sizeof pairs);
}

enum class PanelKind { kPlain, kBand, kFar };  // nothing to mask or weigh; masked; masked, weighed and h summed

struct Gradient {
  VecF p_gated, ds, h;
};

template <class T, PanelKind kKind>
SPARSEK_INLINE Gradient gradient(VecF x, VecF dp, const RowState& row, VecI first, VecI last, VecF score,
                                 VecI frac_begin, VecI frac_end) {
  Gradient result{};
  if constexpr (kKind == PanelKind::kBand) {  // first: the rows' indices
    const VecI visible = (first >= splat_i(row.position.window_begin)) & (first <= splat_i(row.position.own));
    x = select(visible, x, splat(kMasked));
  } else if constexpr (kKind == PanelKind::kFar) {
    const VecI query = splat_i(row.position.query);
    x = select((first <= query) & (query < last), x, splat(kMasked));
  }
  const VecF p = exp2_of<T>(x - row.lse_log2);
  if constexpr (kKind == PanelKind::kFar) {
    const VecI query = splat_i(row.position.query);
    const VecF weight = min(max(score - row.position.tau, splat(0.0f)), splat(1.0f));
    result.h = select((frac_begin <= query) & (query < frac_end), p * dp, splat(0.0f));
    result.p_gated = p * weight;
    result.ds = p * (weight * dp - row.shift);
  } else {
    result.p_gated = p;
    result.ds = p * (dp - row.shift);
  }
  return result;
}

// One panel of a block, all rows of the tile: P and dS from logits and dp.
template <class T, PanelKind kKind>
SPARSEK_INLINE void gradient_panel(const Scratch<T>& s, const Keys<T>& keys, const PanelInfo& panel, int offset,
                                   int rows) {
  for (int v = 0; v < kPanelKeys; v += kLanes) {
    const int column = offset + v, slot = panel.first + v;
    VecI first{}, last{}, frac_begin{}, frac_end{};
    VecF score{}, h{};
    if constexpr (kKind == PanelKind::kBand) first = column_indices(slot);
    if constexpr (kKind == PanelKind::kFar) {
      first = load_i(keys.slot_begin + slot);
      last = load_i(keys.slot_end + slot);
      score = load(keys.slot_score + slot);
      frac_begin = load_i(s.slot_frac_begin + slot);
      frac_end = load_i(s.slot_frac_end + slot);
    }
    const auto row_gradient = [&](int r) {
      const Gradient g =
          gradient<T, kKind>(load(s.logits + r * kBlockKeys + column), load(s.dp + r * kBlockKeys + column), s.rows[r],
                             first, last, score, frac_begin, frac_end);
      if constexpr (kKind == PanelKind::kFar) {
        h += g.h;
        store(s.h_rows + r * kLanes, load(s.h_rows + r * kLanes) + g.h);
      }
      return g;
    };
    if constexpr (sizeof(T) == 2) {
      for (int r = 0; r < rows; r += 2) {
        const Gradient even = row_gradient(r), odd = r + 1 < rows ? row_gradient(r + 1) : Gradient{};
        store_bf16(s.ds + r * kBlockKeys + column, even.ds);
        if (r + 1 < rows) store_bf16(s.ds + (r + 1) * kBlockKeys + column, odd.ds);
        store_interleaved(s.p_transposed + r * kBlockKeys + 2 * column, even.p_gated, odd.p_gated);
        store_interleaved(s.ds_transposed + r * kBlockKeys + 2 * column, even.ds, odd.ds);
      }
    } else {
      for (int r = 0; r < rows; ++r) {
        const Gradient g = row_gradient(r);
        store(s.p_transposed + r * kBlockKeys + column, g.p_gated);
        store(s.ds + r * kBlockKeys + column, g.ds);
      }
    }
    if constexpr (kKind == PanelKind::kFar) {
      store(s.h_columns, h);
      for (int n = 0; n < kLanes; ++n) s.slot_h[slot + n] += static_cast<double>(s.h_columns[n]);
    }
  }
}

template <class T>
SPARSEK_INLINE bool any_fractional(const Scratch<T>& s, const PanelInfo& panel, int32_t first_query,
                                   int32_t last_query) {
  bool any = false;
  for (int slot = panel.first; slot < panel.first + kPanelKeys; ++slot) {
    any |= s.slot_frac_begin[slot] <= last_query && s.slot_frac_end[slot] > first_query;
  }
  return any;
}

template <class T>
void tile_blocks(const AttentionBwdParams& p, const Scratch<T>& s, const Keys<T>& keys, const RunGradients& result,
                 int queries) {
  const int head_dim = p.fwd.head_dim, padded_dim = padded(head_dim), rows = queries * s.group_heads;
  const int depth = (rows + kStep<T> - 1) / kStep<T> * kStep<T>;  // rows as steps of a sum
  const float alpha = static_cast<float>(p.fwd.softmax_scale * 1.4426950408889634);
  // Where element (key, row) of P and dS lies, for the sums over rows.
  const int64_t key_stride = kStep<T>, row_stride = kStep<T> * kBlockKeys;
  for (int first = 0, count; first < keys.num_panels; first += count) {
    const bool is_far = keys.info[first].is_far;
    const int end = is_far ? keys.num_far : keys.num_panels;
    count = end - first < kBlockPanels ? end - first : kBlockPanels;
    const TileRows<T>& q = is_far ? s.q_far : s.q;
    multiply_columns(q.plain, q.stride, rows, head_dim, keys.k_columns + first, count,
                     StoreScaled{s.logits, kBlockKeys, alpha});
    multiply_columns(s.dout.plain, s.dout.stride, rows, head_dim, keys.v_columns + first, count,
                     StoreScaled{s.dp, kBlockKeys, 1.0f});
    for (int n = 0; n < count; ++n) {
      const PanelInfo& panel = keys.info[first + n];
      if (is_far) {
        const int32_t first_query = s.rows[0].position.query, last_query = s.rows[rows - 1].position.query;
        if (panel.is_masked || panel.is_gated || any_fractional(s, panel, first_query, last_query)) {
          gradient_panel<T, PanelKind::kFar>(s, keys, panel, n * kPanelKeys, rows);
          continue;
        }
      } else if (panel.is_masked) {
        gradient_panel<T, PanelKind::kBand>(s, keys, panel, n * kPanelKeys, rows);
        continue;
      }
      gradient_panel<T, PanelKind::kPlain>(s, keys, panel, n * kPanelKeys, rows);
    }
    const int64_t key = is_far ? keys.info[first].first : keys.info[first].first - result.first_panel_row;
    float* dk = (is_far ? s.slot_dk : result.band_dk) + key * padded_dim;
    float* dv = (is_far ? s.slot_dv : result.band_dv) + key * padded_dim;
    const T *q_panel = q.panel, *dout_panel = s.dout.panel;
    multiply_rows(s.p_transposed, key_stride, row_stride, count * kPanelKeys, &dout_panel, 1, depth, padded_dim, dv,
                  padded_dim);
    multiply_rows(s.ds_transposed, key_stride, row_stride, count * kPanelKeys, &q_panel, 1, depth, padded_dim, dk,
                  padded_dim);
    multiply_rows(s.ds, kBlockKeys, kStep<T>, rows, keys.k_rows + first, count, kPanelKeys, padded_dim,
                  is_far ? s.dq_far : s.dq, padded_dim);
  }
}

// Hands over what a slot has collected for its row.
template <class T>
void flush_slot(const Scratch<T>& s, const RunGradients& result, int32_t slot) {
  const int64_t arrival = s.slot_arrival[slot], size = result.padded_dim;
  if (arrival < 0) return;
  const size_t bytes = static_cast<size_t>(size) * sizeof(float);
  std::memcpy(result.far_dk + arrival * size, s.slot_dk + slot * size, bytes);
  std::memcpy(result.far_dv + arrival * size, s.slot_dv + slot * size, bytes);
  result.far_h[arrival] = s.slot_h[slot];
}

SPARSEK_INLINE VecF load_as(const float* from) {
  return load(from);
}
SPARSEK_INLINE VecF load_as(const BFloat16* from) {
  return load_bf16(from);
}

SPARSEK_INLINE float as_float(float x) {
  return x;
}
SPARSEK_INLINE float as_float(BFloat16 x) {
  return to_float(x);
}

template <class T>
SPARSEK_INLINE float dot(const T* a, const T* b, int size) {
  VecF sum{};
  int c = 0;
  for (; c + kLanes <= size; c += kLanes) sum += load_as(a + c) * load_as(b + c);
  float total = reduce_add(sum);
  for (; c < size; ++c) total += as_float(a[c]) * as_float(b[c]);
  return total;
}

constexpr KeyLayouts kLayouts{.v_rows = false, .v_columns = true, .k_rows = true};

template <class T>
void run(const AttentionBwdParams& p, const RunPlan& plan, char* memory, const RunGradients& result, double* h_sums) {
  const AttentionFwdParams& f = p.fwd;
  Arena arena(memory);
  const Scratch<T> s(&arena, p, plan);
  Keys<T> keys(&arena, plan, f.head_dim, kLayouts);
  const int b = plan.batch, kv = plan.kv_head, first_head = kv * s.group_heads, padded_dim = padded(f.head_dim);
  const int64_t lane = static_cast<int64_t>(b) * f.num_kv_heads + kv;
  const bool soft = f.gate == Gate::kSoft;
  const float* tau = static_cast<const float*>(f.tau) + lane * f.seqlen_q;
  const int32_t* window_begin = f.window_begin + static_cast<int64_t>(b) * f.seqlen_q;
  const int64_t num_score_rows = static_cast<int64_t>(p.num_pool_rows) + f.seqlen_k;
  const int32_t* frac_begin = p.frac_begin + lane * num_score_rows + p.num_pool_rows;
  const int32_t* frac_end = p.frac_end + lane * num_score_rows + p.num_pool_rows;
  const auto row_of = [&](const void* base, const Strides& strides, int64_t i, int64_t head) {
    return static_cast<const T*>(base) + b * strides.batch + i * strides.seq + head * strides.head;
  };

  keys.begin_run(plan, key_source<T>(f, plan));
  const size_t band_bytes = static_cast<size_t>(result.num_panels) * kPanelKeys * padded_dim * sizeof(float);
  std::memset(result.band_dk, 0, band_bytes);
  std::memset(result.band_dv, 0, band_bytes);
  s.q.clear();
  s.q_far.clear();
  s.dout.clear();
  for (int slot = 0; slot < plan.max_slots; ++slot) {
    s.slot_arrival[slot] = -1;
    s.slot_h[slot] = 0;
    s.slot_frac_begin[slot] = s.slot_frac_end[slot] = 0;
  }
  const size_t slot_row_bytes = static_cast<size_t>(padded_dim) * sizeof(float);
  std::memset(s.slot_dk, 0, static_cast<size_t>(plan.max_slots) * slot_row_bytes);
  std::memset(s.slot_dv, 0, static_cast<size_t>(plan.max_slots) * slot_row_bytes);

  for (int t = 0; t < plan.num_tiles; ++t) {
    const int32_t first = plan.first_query + t * plan.tile_queries;
    const int32_t end = first + plan.tile_queries < plan.end_query ? first + plan.tile_queries : plan.end_query;
    const int queries = end - first, rows = queries * s.group_heads;
    for (int n = plan.tile_arrivals[t]; n < plan.tile_arrivals[t + 1]; ++n) {
      const Arrival arrival = plan.arrivals[n];
      flush_slot(s, result, arrival.slot);
      s.slot_arrival[arrival.slot] = n;
      s.slot_frac_begin[arrival.slot] = frac_begin[arrival.row];
      s.slot_frac_end[arrival.slot] = frac_end[arrival.row];
      s.slot_h[arrival.slot] = 0;
      std::memset(s.slot_dk + static_cast<int64_t>(arrival.slot) * padded_dim, 0, slot_row_bytes);
      std::memset(s.slot_dv + static_cast<int64_t>(arrival.slot) * padded_dim, 0, slot_row_bytes);
      result.far_row[n] = arrival.row;
    }
    float tau_max = -__builtin_inff();
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r / s.group_heads, head = first_head + r % s.group_heads;
      const int64_t lse_index = (static_cast<int64_t>(b) * f.num_heads + head) * f.seqlen_q + i;
      const T* dout = row_of(p.dout, p.dout_strides, i, head);
      s.q.set(r, row_of(f.q, f.q_strides, i, head));
      if (f.q_far) s.q_far.set(r, row_of(f.q_far, f.q_far_strides, i, head));
      s.dout.set(r, dout);
      const float lse = static_cast<const float*>(f.softmax_lse)[lse_index];
      const float dlse = p.dlse ? static_cast<const float*>(p.dlse)[lse_index] : 0.0f;
      const float delta = dot(dout, row_of(f.out, f.out_strides, i, head), f.head_dim);
      s.rows[r].position = {static_cast<int32_t>(i), window_begin[i], f.num_carried + static_cast<int32_t>(i),
                            soft ? tau[i] : 0.0f};
      s.rows[r].lse_log2 = lse > -__builtin_inff() ? static_cast<float>(lse * 1.4426950408889634) : 1e20f;
      s.rows[r].shift = delta - dlse;
      if (soft && tau[i] > tau_max) tau_max = tau[i];
    }
    keys.begin_tile(plan, t, window_begin[first], window_begin[end - 1], first, end - 1, tau_max);
    std::memset(s.dq, 0, static_cast<size_t>(rows) * slot_row_bytes);
    std::memset(s.dq_far, 0, static_cast<size_t>(rows) * slot_row_bytes);
    std::memset(s.h_rows, 0, static_cast<size_t>(rows) * kLanes * sizeof(float));

    tile_blocks(p, s, keys, result, queries);

    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r / s.group_heads, head = first_head + r % s.group_heads;
      const int64_t to = ((static_cast<int64_t>(b) * f.seqlen_q + i) * f.num_heads + head) * f.head_dim;
      write_row(static_cast<T*>(p.dq) + to, s.dq + r * padded_dim, static_cast<float>(f.softmax_scale), f.head_dim);
      if (f.q_far)
        write_row(static_cast<T*>(p.dq_far) + to, s.dq_far + r * padded_dim, static_cast<float>(f.softmax_scale),
                  f.head_dim);
      if (r % s.group_heads == 0) h_sums[i] = 0;
      h_sums[i] += static_cast<double>(reduce_add(load(s.h_rows + r * kLanes)));
    }
  }
  for (int slot = 0; slot < plan.max_slots; ++slot) flush_slot(s, result, slot);
}

template <class T>
size_t scratch_bytes(const AttentionBwdParams& p, const RunPlan& plan) {
  Arena arena(nullptr);
  Scratch<T>(&arena, p, plan);
  Keys<T>(&arena, plan, p.fwd.head_dim, kLayouts);
  return arena.used_bytes();
}

}  // namespace

size_t backward_scratch_bytes(const AttentionBwdParams& p, const RunPlan& plan) {
  return p.fwd.dtype == DType::kBF16 ? scratch_bytes<BFloat16>(p, plan) : scratch_bytes<float>(p, plan);
}
void backward_run(const AttentionBwdParams& p, const RunPlan& plan, char* scratch, const RunGradients& result,
                  double* h_sums) {
  p.fwd.dtype == DType::kBF16 ? run<BFloat16>(p, plan, scratch, result, h_sums)
                              : run<float>(p, plan, scratch, result, h_sums);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
