// eq. 1b for one run of query tiles, float32 and bfloat16: one pass of Q K^T over the window band and the sinks. The
// exponentials of the keys in the older half of a window are kept until the row's sum is known; of the others only the
// sum is.
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/query_tile.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kBlockPanels = 4;
constexpr int kGroupRows = 24;
constexpr int kBlockKeys = kBlockPanels * kPanelKeys;
constexpr float kLargestSum = 1e30f;

template <class T>
struct Scratch {
  Scratch(Arena* arena, const WindowMassParams& p, const RunPlan& plan)
      : group_heads(p.num_heads / p.num_kv_heads), max_rows(plan.tile_queries * group_heads) {
    const int max_panels = plan.ring_panels + plan.max_slots / kPanelKeys;
    q = arena->take<T>(max_rows * p.head_dim);
    q_far = p.q_far ? arena->take<T>(max_rows * p.head_dim) : q;
    row_shift = arena->take<float>(max_rows);
    row_sum = arena->take<float>(max_rows * kLanes);
    row_inverse = arena->take<float>(max_rows);
    positions = arena->take<QueryPosition>(plan.tile_queries);
    logits = arena->take<float>(kGroupRows * kBlockKeys);
    kept_stride = static_cast<int64_t>(plan.ring_panels) * kPanelKeys;
    kept = arena->take<float>(max_rows * kept_stride);
    block_shift = arena->take<float>(static_cast<int64_t>(max_panels) * max_rows);
  }
  int group_heads, max_rows;
  T *q, *q_far;
  float* row_shift;  // what is subtracted from logits: near the row's maximum
  float* row_sum;    // [rows][kLanes]
  float* row_inverse;
  QueryPosition* positions;
  float* logits;  // [kGroupRows][kBlockKeys]
  float* kept;    // [rows][kept_stride] exponentials, column 0 is the first panel of the band
  int64_t kept_stride;
  float* block_shift;  // [panels][rows] row_shift when that panel's exponentials were made
};

// One row of a block. The shift is the maximum of the row's first block, which holds its own key; kCareful: the running
// maximum, for rows whose later logits exceed it by more than float32 can hold.
template <class T, bool kCareful>
SPARSEK_INLINE void row_of_block(const Scratch<T>& s, const Keys<T>& keys, int first_panel, int num_panels,
                                 bool is_first, int row, float* logits, int first_new_panel) {
  constexpr int kPerPanel = kPanelKeys / kLanes;
  const QueryPosition& position = s.positions[row / s.group_heads];
  for (int n = 0; n < num_panels; ++n) {
    const PanelInfo& panel = keys.info[first_panel + n];
    if (!panel.is_masked) continue;
    float* x = logits + n * kPanelKeys;
    for (int v = 0; v < kPerPanel; ++v) {
      store(x + v * kLanes, mask(load(x + v * kLanes), keys, panel, v * kLanes, position));
    }
  }
  if (kCareful || is_first) {
    VecF top = splat(kMasked);
    for (int v = 0; v < num_panels * kPerPanel; ++v) top = max(top, load(logits + v * kLanes));
    const float block_max = reduce_max(top);
    if (block_max > s.row_shift[row]) {
      const VecF factor = exp2_of<float>(splat(s.row_shift[row] - block_max));
      s.row_shift[row] = block_max;
      store(s.row_sum + row * kLanes, load(s.row_sum + row * kLanes) * factor);
    }
  }
  const VecF shift = splat(s.row_shift[row]);
  VecF sum = load(s.row_sum + row * kLanes);
  for (int n = 0; n < num_panels; ++n) {
    const int index = first_panel + n;
    const float* x = logits + n * kPanelKeys;
    if (index >= keys.num_far && index < first_new_panel) {
      float* kept = s.kept + row * s.kept_stride + static_cast<int64_t>(index - keys.num_far) * kPanelKeys;
      s.block_shift[index * s.max_rows + row] = s.row_shift[row];
      for (int v = 0; v < kPerPanel; ++v) {
        const VecF e = exp2_of<T>(load(x + v * kLanes) - shift);
        sum += e;
        store(kept + v * kLanes, e);
      }
    } else {
      for (int v = 0; v < kPerPanel; ++v) sum += exp2_of<T>(load(x + v * kLanes) - shift);
    }
  }
  store(s.row_sum + row * kLanes, sum);
}

// All panels of the tile, the newest first. first_new_panel: from there on no key is in the older half of any window.
template <class T, bool kCareful>
void tile_blocks(const WindowMassParams& p, const Scratch<T>& s, const Keys<T>& keys, int rows, int first_new_panel) {
  const float alpha = static_cast<float>(static_cast<double>(p.softmax_scale) * 1.4426950408889634);
  for (int r = 0; r < rows; ++r) s.row_shift[r] = kNothing;
  std::memset(s.row_sum, 0, static_cast<size_t>(rows) * kLanes * sizeof(float));
  for (int end = keys.num_panels, count; end > 0; end -= count) {
    const bool is_far = keys.info[end - 1].is_far;
    const int begin = is_far ? 0 : keys.num_far;
    count = end - begin < kBlockPanels ? end - begin : kBlockPanels;
    const int first = end - count;
    for (int r = 0; r < rows; r += kGroupRows) {
      const int group = rows - r < kGroupRows ? rows - r : kGroupRows;
      multiply_columns((is_far ? s.q_far : s.q) + r * p.head_dim, p.head_dim, group, p.head_dim, keys.k_columns + first,
                       count, s.logits, kBlockKeys, alpha);
      for (int n = 0; n < group; ++n) {
        row_of_block<T, kCareful>(s, keys, first, count, end == keys.num_panels, r + n, s.logits + n * kBlockKeys,
                                  first_new_panel);
      }
    }
  }
}

template <class T>
KeySource<T> mass_key_source(const WindowMassParams& p, const RunPlan& plan) {
  const auto at = [&](const void* base, const Strides& strides) {
    return static_cast<const T*>(base) + plan.batch * strides.batch + plan.kv_head * strides.head;
  };
  KeySource<T> source{};
  source.k = at(p.k, p.k_strides);
  source.k_far = p.k_far ? at(p.k_far, p.k_far_strides) : source.k;
  source.k_stride = p.k_strides.seq;
  source.k_far_stride = p.k_far ? p.k_far_strides.seq : p.k_strides.seq;
  source.far_begin = p.far_begin + static_cast<int64_t>(plan.batch) * p.seqlen_k;
  source.far_end = p.far_end + static_cast<int64_t>(plan.batch) * p.seqlen_k;
  source.num_carried = p.num_carried;
  return source;
}

constexpr KeyLayouts kLayouts{.v_rows = false, .v_columns = false, .k_rows = false};

template <class T>
void run(const WindowMassParams& p, const RunPlan& plan, char* memory, float* mass) {
  Arena arena(memory);
  const Scratch<T> s(&arena, p, plan);
  Keys<T> keys(&arena, plan, p.head_dim, kLayouts);
  const int b = plan.batch, first_head = plan.kv_head * s.group_heads, half = (p.window_size + 1) / 2;
  const int32_t* window_begin = p.window_begin + static_cast<int64_t>(b) * p.seqlen_q;
  const auto at = [&](const void* base, const Strides& strides) {
    return static_cast<const T*>(base) + b * strides.batch + first_head * strides.head;
  };
  const T *q = at(p.q, p.q_strides), *q_far = p.q_far ? at(p.q_far, p.q_far_strides) : nullptr;
  const int num_rows = plan.end_band_row - plan.first_band_row;
  std::memset(mass, 0, static_cast<size_t>(num_rows) * sizeof(float));

  keys.begin_run(plan, mass_key_source<T>(p, plan));
  for (int t = 0; t < plan.num_tiles; ++t) {
    const int32_t first = plan.first_query + t * plan.tile_queries;
    const int32_t end = first + plan.tile_queries < plan.end_query ? first + plan.tile_queries : plan.end_query;
    const int queries = end - first, rows = queries * s.group_heads;
    for (int n = 0; n < queries; ++n) {
      s.positions[n] = {first + n, window_begin[first + n], p.num_carried + first + n, 0.0f};
    }
    keys.begin_tile(plan, t, window_begin[first], window_begin[end - 1], first, end - 1, 0.0f);
    gather_rows(q + first * p.q_strides.seq, p.q_strides.seq, p.q_strides.head, queries, s.group_heads, p.head_dim,
                s.q);
    if (q_far) {
      gather_rows(q_far + first * p.q_far_strides.seq, p.q_far_strides.seq, p.q_far_strides.head, queries,
                  s.group_heads, p.head_dim, s.q_far);
    }
    const int32_t last_old_row = p.num_carried + end - 1 - half;  // of the last query
    int first_new_panel = keys.num_far;
    while (first_new_panel < keys.num_panels && keys.info[first_new_panel].first <= last_old_row) ++first_new_panel;

    tile_blocks<T, false>(p, s, keys, rows, first_new_panel);
    bool fits = true;
    for (int r = 0; r < rows; ++r) fits &= reduce_add(load(s.row_sum + r * kLanes)) < kLargestSum;
    if (!fits) tile_blocks<T, true>(p, s, keys, rows, first_new_panel);

    for (int r = 0; r < rows; ++r) s.row_inverse[r] = 1.0f / reduce_add(load(s.row_sum + r * kLanes));
    for (int n = keys.num_far; n < first_new_panel; ++n) {
      const PanelInfo& panel = keys.info[n];
      for (int v = 0; v < kPanelKeys; v += kLanes) {
        const VecI row_index = column_indices(panel.first + v);
        const float* kept = s.kept + static_cast<int64_t>(n - keys.num_far) * kPanelKeys + v;
        VecF sum{};
        for (int r = 0; r < rows; ++r) {
          const float shift = s.block_shift[n * s.max_rows + r];
          const float weight = shift == s.row_shift[r]
                                   ? s.row_inverse[r]
                                   : s.row_inverse[r] * exp2_of<float>(splat(shift - s.row_shift[r]))[0];
          const VecI is_old = row_index <= splat_i(s.positions[r / s.group_heads].own - half);
          sum += select(is_old, load(kept + r * s.kept_stride) * weight, splat(0.0f));
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          const int32_t row = panel.first + v + lane - plan.first_band_row;
          if (row >= 0 && row < num_rows) mass[row] += sum[lane];
        }
      }
    }
  }
}

template <class T>
size_t scratch_bytes(const WindowMassParams& p, const RunPlan& plan) {
  Arena arena(nullptr);
  Scratch<T>(&arena, p, plan);
  Keys<T>(&arena, plan, p.head_dim, kLayouts);
  return arena.used_bytes();
}

}  // namespace

size_t window_mass_scratch_bytes(const WindowMassParams& p, const RunPlan& plan) {
  return p.dtype == DType::kBF16 ? scratch_bytes<BFloat16>(p, plan) : scratch_bytes<float>(p, plan);
}
void window_mass_run(const WindowMassParams& p, const RunPlan& plan, char* scratch, float* mass) {
  p.dtype == DType::kBF16 ? run<BFloat16>(p, plan, scratch, mass) : run<float>(p, plan, scratch, mass);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
