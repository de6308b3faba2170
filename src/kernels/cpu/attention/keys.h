// The keys and values that a tile of queries can see, packed for tile.h: a ring of panels with the window's rows and a
// set of slots with the far rows (plan.h). Each row is packed once a run. Included by *.simd.cc files only.
//
// Rows that no query of the run sees are never read. What else a panel holds (zeros, or a key that died) is finite:
// its probability is exactly 0, and 0 times it must be 0.
#pragma once
#include "kernels/cpu/attention/arena.h"
#include "kernels/cpu/attention/pack.h"

namespace sparsek::cpu::SPARSEK_ISA {

// Where the rows of one (batch row, KV head) lie.
template <class T>
struct KeySource {
  const T *k, *v, *k_far;  // k_far: k where there is no far rotary; v null where values are not wanted
  int64_t k_stride, v_stride, k_far_stride;
  const float* scores;  // null where gates are not wanted
  const int32_t *far_begin, *far_end;
  int32_t num_carried, head_dim;
};

struct PanelInfo {
  bool is_far;
  bool is_masked;  // some query of the tile does not see some key of it
  bool is_gated;   // some weight may be below 1
  int32_t first;   // window row, or slot, of column 0
};

// Which layouts are wanted beside K in columns.
struct KeyLayouts {
  bool v_rows, v_columns, k_rows;
};

template <class T>
struct Keys {
  // Scratch of one run.
  Keys(Arena* arena, const RunPlan& plan, int head_dim_, KeyLayouts layouts) : head_dim(head_dim_) {
    panel_size = kPanelKeys * padded(head_dim);
    num_slot_panels = plan.max_slots / kPanelKeys;
    ring_panels = plan.ring_panels;
    const int64_t panels = num_slot_panels + ring_panels;
    storage_size = panels * panel_size;
    k_column_storage = arena->take<T>(storage_size);
    v_row_storage = arena->take<T>(layouts.v_rows ? storage_size : 0);
    v_column_storage = arena->take<T>(layouts.v_columns ? storage_size : 0);
    k_row_storage = arena->take<T>(layouts.k_rows ? storage_size : 0);
    has = layouts;
    slot_row = arena->take<int32_t>(plan.max_slots);
    slot_begin = arena->take<int32_t>(plan.max_slots);
    slot_end = arena->take<int32_t>(plan.max_slots);
    slot_score = arena->take<float>(plan.max_slots);
    info = arena->take<PanelInfo>(panels);
    k_columns = arena->take<const T*>(panels);
    v_rows = arena->take<const T*>(panels);
    v_columns = arena->take<const T*>(panels);
    k_rows = arena->take<const T*>(panels);
  }

  void begin_run(const RunPlan& plan, const KeySource<T>& source_) {
    source = source_;
    const size_t bytes = static_cast<size_t>(storage_size) * sizeof(T);
    std::memset(k_column_storage, 0, bytes);
    if (has.v_rows) std::memset(v_row_storage, 0, bytes);
    if (has.v_columns) std::memset(v_column_storage, 0, bytes);
    if (has.k_rows) std::memset(k_row_storage, 0, bytes);
    for (int slot = 0; slot < plan.max_slots; ++slot) {
      slot_row[slot] = -1;
      slot_begin[slot] = slot_end[slot] = 0;
      slot_score[slot] = __builtin_inff();
    }
    next_panel = plan.panel_of(plan.first_band_row);
  }

  // Packs what tile t of the run sees for the first time and lists its panels: num_far of far rows, then the window's.
  // window_begin, window_begin_last: of the tile's first and last query; tau_max: the largest threshold of the tile.
  void begin_tile(const RunPlan& plan, int t, int32_t window_begin, int32_t window_begin_last, int32_t first_query,
                  int32_t last_query, float tau_max) {
    for (int n = plan.tile_arrivals[t]; n < plan.tile_arrivals[t + 1]; ++n) {
      const int32_t row = plan.arrivals[n].row, slot = plan.arrivals[n].slot;
      constexpr int kAhead = 8;
      if (n + kAhead < plan.tile_arrivals[t + 1]) {
        const int32_t next = plan.arrivals[n + kAhead].row;
        prefetch_rows(source.k_far + next * source.k_far_stride, 0, 1, head_dim);
        if (source.v) prefetch_rows(source.v + next * source.v_stride, 0, 1, head_dim);
      }
      slot_row[slot] = row;
      slot_begin[slot] = source.far_begin[row];
      slot_end[slot] = source.far_end[row];
      if (source.scores) slot_score[slot] = source.scores[row];
      pack(slot / kPanelKeys, slot % kPanelKeys, source.k_far + row * source.k_far_stride, row);
    }
    first_band_panel = plan.panel_of(window_begin);
    const int32_t last_own = source.num_carried + last_query, last_panel = plan.panel_of(last_own);
    for (; next_panel <= last_panel; ++next_panel) {
      pack_band_panel(plan, next_panel);
    }

    num_far = (plan.tile_slots[t] + kPanelKeys - 1) / kPanelKeys;
    num_panels = num_far + last_panel - first_band_panel + 1;
    for (int panel = 0; panel < num_far; ++panel) {
      bool masked = false, gated = false;
      for (int slot = panel * kPanelKeys; slot < (panel + 1) * kPanelKeys; ++slot) {
        masked |= slot_begin[slot] > first_query || slot_end[slot] <= last_query;
        gated |= !(slot_score[slot] - tau_max >= 1.0f);
      }
      list(panel, panel, {true, masked, gated && source.scores, panel * kPanelKeys});
    }
    const int32_t first_own = last_own - (last_query - first_query);
    for (int n = num_far; n < num_panels; ++n) {
      const int32_t panel = first_band_panel + n - num_far, start = panel * kPanelKeys - plan.panel_shift;
      const bool masked = start < window_begin_last || start + kPanelKeys - 1 > first_own;
      list(n, num_slot_panels + panel % ring_panels, {false, masked, false, start});
    }
  }

  int head_dim;
  int64_t panel_size, storage_size;
  int32_t num_slot_panels, ring_panels;
  KeyLayouts has;
  KeySource<T> source;
  T *k_column_storage, *v_row_storage, *v_column_storage, *k_row_storage;
  int32_t next_panel = 0;  // the first that is not packed yet

  int32_t *slot_row, *slot_begin, *slot_end;  // -1, 0, 0: never used
  float* slot_score;

  // The tile's panels.
  int32_t num_far = 0, num_panels = 0;
  int32_t first_band_panel = 0;
  PanelInfo* info;
  const T **k_columns, **v_rows, **v_columns, **k_rows;

 private:
  void pack_band_panel(const RunPlan& plan, int32_t panel) {
    const int32_t start = panel * kPanelKeys - plan.panel_shift, end = start + kPanelKeys;
    const int64_t to = num_slot_panels + panel % ring_panels;
    if (start < plan.first_band_row || end > plan.end_band_row) {
      const int32_t first = start < plan.first_band_row ? plan.first_band_row : start;
      for (int32_t row = first; row < end && row < plan.end_band_row; ++row) {
        pack(to, row - start, source.k + row * source.k_stride, row);
      }
      return;
    }
    const T* k = source.k + start * source.k_stride;
    pack_columns(k_column_storage + to * panel_size, k, source.k_stride, head_dim);
    if (has.k_rows) pack_rows(k_row_storage + to * panel_size, k, source.k_stride, head_dim);
    if (has.v_rows) {
      pack_rows(v_row_storage + to * panel_size, source.v + start * source.v_stride, source.v_stride, head_dim);
    }
    if (has.v_columns) {
      pack_columns(v_column_storage + to * panel_size, source.v + start * source.v_stride, source.v_stride, head_dim);
    }
    const int32_t ahead = plan.end_band_row - end < kPanelKeys ? plan.end_band_row - end : kPanelKeys;
    prefetch_rows(source.k + end * source.k_stride, source.k_stride, ahead, head_dim);
    if (source.v) prefetch_rows(source.v + end * source.v_stride, source.v_stride, ahead, head_dim);
  }
  SPARSEK_INLINE void pack(int64_t panel, int column, const T* k, int32_t row) {
    pack_column(k_column_storage + panel * panel_size, column, k, head_dim);
    if (has.k_rows) pack_row(k_row_storage + panel * panel_size, column, k, head_dim);
    if (has.v_rows) pack_row(v_row_storage + panel * panel_size, column, source.v + row * source.v_stride, head_dim);
    if (has.v_columns) {
      pack_column(v_column_storage + panel * panel_size, column, source.v + row * source.v_stride, head_dim);
    }
  }
  SPARSEK_INLINE void list(int n, int64_t panel, const PanelInfo& panel_info) {
    info[n] = panel_info;
    k_columns[n] = k_column_storage + panel * panel_size;
    v_rows[n] = v_row_storage + panel * panel_size;
    v_columns[n] = v_column_storage + panel * panel_size;
    k_rows[n] = k_row_storage + panel * panel_size;
  }
};

}  // namespace sparsek::cpu::SPARSEK_ISA
