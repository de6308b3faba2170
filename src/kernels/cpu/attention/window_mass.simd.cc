// eq. 1b for one run of query tiles, float32 and bfloat16: one pass of Q K^T over the window band and the sinks. The
// exponentials of the keys in the older half of a window are kept until the row's sum is known; of the others only the
// sum is.
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/query_tile.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kBlockPanels = 8;
constexpr int kGroupRows = 24;
constexpr int kBlockKeys = kBlockPanels * kPanelKeys;
constexpr float kLargestSum = 1e30f;

template <class T>
struct Scratch {
  Scratch(Arena* arena, const WindowMassParams& p, const RunPlan& plan)
      : group_heads(p.num_heads / p.num_kv_heads), max_rows(plan.tile_queries * group_heads) {
    q = arena->take<T>(max_rows * p.head_dim);
    q_far = p.q_far ? arena->take<T>(max_rows * p.head_dim) : q;
    row_shift = arena->take<float>(max_rows);
    row_sum = arena->take<float>(max_rows * kLanes);
    row_inverse = arena->take<float>(max_rows);
    logits = arena->take<float>(kGroupRows * kBlockKeys);
    positions = arena->take<QueryPosition>(max_rows);
    weights = arena->take<float>(max_rows);
    last_old = arena->take<int32_t>(max_rows);
    kept = arena->take<float>(static_cast<int64_t>(plan.ring_panels) * max_rows * kPanelKeys);
    block_shift = arena->take<float>(static_cast<int64_t>(plan.ring_panels) * max_rows);
  }
  int group_heads, max_rows;
  T *q, *q_far;
  float* row_shift;  // what is subtracted from logits: near the row's maximum
  float* row_sum;    // [rows][kLanes]
  float* row_inverse;
  QueryPosition* positions;  // [rows]
  float* weights;            // [rows] of one panel
  int32_t* last_old;         // [rows] the newest window row in the older half of the row's window
  float* logits;             // [kGroupRows][kBlockKeys]
  float* kept;               // [panels][rows][kPanelKeys] exponentials; the first panel is the band's first
  float* block_shift;        // [panels][rows] row_shift when they were made
};

// What the rows of a block share.
struct Block {
  int first, count;  // panels
  bool is_masked, is_kept, takes_maximum;
};

// All exponentials of eq. 1b use the shorter polynomial: 4e-6 is far below what a score feels.
SPARSEK_INLINE VecF exponential(VecF x) {
  return exp2_of<BFloat16>(x);
}

// Exponentials of a block without masks whose rows have their shift, while they are in registers.
template <bool kKept>
struct SumExponentials {
  template <int kRows, int kVectors>
  SPARSEK_INLINE void operator()(const VecF (&acc)[kRows][kVectors], int row, int column) const {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF shift = splat(row_shift[row + r]);
      VecF sum = load(row_sum + (row + r) * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const VecF e = exponential(acc[r][v] * alpha - shift);
        sum += e;
        if constexpr (kKept) {
          const int to = column + v * kLanes;
          store(kept + to / kPanelKeys * kept_stride + (row + r) * kPanelKeys + to % kPanelKeys, e);
        }
      }
      store(row_sum + (row + r) * kLanes, sum);
    }
  }
  float alpha;
  const float* row_shift;
  float *row_sum, *kept;
  int64_t kept_stride;
};

// One row of a block. The shift is the maximum of the row's first block, which holds its own key, or a running maximum
// where some row's later logits exceed that by more than float32 can hold.
template <class T>
SPARSEK_INLINE void row_of_block(const Keys<T>& keys, const Block& block, const QueryPosition& position, float alpha,
                                 const float* logits, float* row_shift, float* row_sum, float* kept,
                                 int64_t kept_stride) {
  if (block.takes_maximum) {
    const float block_max = block_maximum(logits, alpha, keys, block.first, block.count, position);
    if (block_max > *row_shift) {
      const VecF factor = exp2_of<float>(splat(*row_shift - block_max));
      *row_shift = block_max;
      store(row_sum, load(row_sum) * factor);
    }
  }
  const VecF shift = splat(*row_shift);
  VecF sum = load(row_sum);
  for (int n = 0; n < block.count; ++n) {
    const PanelInfo panel = keys.info[block.first + n];
    for (int column = 0; column < kPanelKeys; column += kLanes) {
      const VecF e = exponential(scaled_logits(logits + n * kPanelKeys, alpha, shift, keys, panel, column, position));
      sum += e;
      if (block.is_kept) store(kept + n * kept_stride + column, e);
    }
  }
  store(row_sum, sum);
}

// All panels of the tile, the newest first. first_new_panel: from there on no key is in the older half of any window.
template <class T>
void tile_blocks(const WindowMassParams& p, const Scratch<T>& s, const Keys<T>& keys, int rows, int first_new_panel,
                 bool running_maximum, RowPrefetch<T>* prefetch) {
  const float alpha = static_cast<float>(p.softmax_scale * 1.4426950408889634);
  const int64_t kept_stride = static_cast<int64_t>(s.max_rows) * kPanelKeys;
  for (int r = 0; r < rows; ++r) s.row_shift[r] = kNothing;
  std::memset(s.row_sum, 0, static_cast<size_t>(rows) * kLanes * sizeof(float));
  for (int end = keys.num_panels; end > 0;) {
    const bool is_far = keys.info[end - 1].is_far;
    Block block{};
    block.first = block_begin(keys, end, kBlockPanels);
    block.count = end - block.first;
    block.is_kept = !is_far && block.first < first_new_panel;
    block.takes_maximum = running_maximum || end == keys.num_panels;
    for (int n = block.first; n < end; ++n) block.is_masked |= keys.info[n].is_masked;
    end = block.first;
    const int64_t band_panel = is_far ? 0 : block.first - keys.num_far;
    for (int r = 0; r < rows; r += kGroupRows) {
      const int group = rows - r < kGroupRows ? rows - r : kGroupRows;
      prefetch->some(group / 2);
      const T* q = (is_far ? s.q_far : s.q) + r * p.head_dim;
      const T* const* k_columns = keys.k_columns + block.first;
      float* kept = s.kept + band_panel * kept_stride + r * kPanelKeys;
      if (!block.is_masked && !block.takes_maximum) {
        float* row_sum = s.row_sum + r * kLanes;
        if (block.is_kept) {
          multiply_columns(q, p.head_dim, group, p.head_dim, k_columns, block.count,
                           SumExponentials<true>{alpha, s.row_shift + r, row_sum, kept, kept_stride});
        } else {
          multiply_columns(q, p.head_dim, group, p.head_dim, k_columns, block.count,
                           SumExponentials<false>{alpha, s.row_shift + r, row_sum, nullptr, 0});
        }
        continue;
      }
      multiply_columns(q, p.head_dim, group, p.head_dim, k_columns, block.count,
                       StoreScaled{s.logits, kBlockKeys, 1.0f});
      for (int n = 0; n < group; ++n) {
        const int row = r + n;
        row_of_block(keys, block, s.positions[row], alpha, s.logits + n * kBlockKeys, s.row_shift + row,
                     s.row_sum + row * kLanes, kept + n * kPanelKeys, kept_stride);
      }
    }
    for (int n = 0; block.is_kept && n < block.count; ++n) {
      std::memcpy(s.block_shift + (band_panel + n) * s.max_rows, s.row_shift,
                  static_cast<size_t>(rows) * sizeof(float));
    }
  }
}

// Sums the columns of one panel of kept exponentials, each row divided by its sum, into mass[0 .. kPanelKeys).
template <class T>
void sum_columns(const Scratch<T>& s, const PanelInfo& panel, const float* kept, const float* block_shift, int rows,
                 bool all_old, float* mass) {
  constexpr int kPerPanel = kPanelKeys / kLanes;
  float* weights = s.weights;
  for (int r = 0; r < rows; ++r) {
    weights[r] = s.row_inverse[r];
    const float shift = block_shift[r] - s.row_shift[r];
    if (shift != 0) weights[r] *= exp2_of<float>(splat(shift))[0];
  }
  VecF sum[kPerPanel] = {};
  if (all_old) {
    for (int r = 0; r < rows; ++r) {
      const VecF weight = splat(weights[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kPerPanel; ++v) sum[v] += load(kept + r * kPanelKeys + v * kLanes) * weight;
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      const VecF weight = splat(weights[r]);
      const VecI last_old = splat_i(s.last_old[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kPerPanel; ++v) {
        const VecF e = load(kept + r * kPanelKeys + v * kLanes);
        sum[v] += select(column_indices(panel.first + v * kLanes) <= last_old, e * weight, splat(0.0f));
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kPerPanel; ++v) store(mass + v * kLanes, sum[v]);
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
    for (int r = 0; r < rows; ++r) {
      const int32_t i = first + r / s.group_heads, own = p.num_carried + i;
      s.positions[r] = {i, window_begin[i], own, 0.0f};
      s.last_old[r] = own - half;
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

    const int rows_ahead = (plan.end_query - end < queries ? plan.end_query - end : queries) * s.group_heads;
    RowPrefetch<T> prefetch{
        q + end * p.q_strides.seq, p.q_strides.seq, p.q_strides.head, rows_ahead, s.group_heads, p.head_dim};
    tile_blocks(p, s, keys, rows, first_new_panel, false, &prefetch);
    bool fits = true;
    for (int r = 0; r < rows; ++r) {
      const float sum = reduce_add(load(s.row_sum + r * kLanes));
      fits &= sum < kLargestSum;
      s.row_inverse[r] = 1.0f / sum;
    }
    if (!fits) {
      tile_blocks(p, s, keys, rows, first_new_panel, true, &prefetch);
      for (int r = 0; r < rows; ++r) s.row_inverse[r] = 1.0f / reduce_add(load(s.row_sum + r * kLanes));
    }

    for (int n = keys.num_far; n < first_new_panel; ++n) {
      const PanelInfo panel = keys.info[n];
      const int64_t band_panel = n - keys.num_far;
      float columns[kPanelKeys];
      sum_columns(s, panel, s.kept + band_panel * s.max_rows * kPanelKeys, s.block_shift + band_panel * s.max_rows,
                  rows, panel.first + kPanelKeys - 1 <= s.last_old[0], columns);
      for (int column = 0; column < kPanelKeys; ++column) {
        const int32_t row = panel.first + column - plan.first_band_row;
        if (row >= 0 && row < num_rows) mass[row] += columns[column];
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
