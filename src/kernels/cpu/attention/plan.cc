#include "kernels/cpu/attention/plan.h"

#include <algorithm>

namespace sparsek::cpu {

int32_t tile_queries(int32_t group_heads) {
  if (group_heads <= 1) return 64;
  if (group_heads <= 4) return 32;
  return group_heads <= 8 ? 16 : 8;
}

int32_t run_queries(int64_t batch_times_kv_heads, int32_t seqlen_q, int32_t tile, int64_t wanted_runs) {
  constexpr int64_t kShortest = 128, kLongest = 8192;
  const int64_t length = std::clamp(batch_times_kv_heads * seqlen_q / wanted_runs, kShortest, kLongest);
  return static_cast<int32_t>((length + tile - 1) / tile * tile);
}

namespace {

constexpr int32_t kStride = 32;

// kStride rows that no query from `query` on sees.
bool all_dead(const int32_t* far_end, int32_t query) {
  int32_t latest = far_end[0];
  for (int32_t n = 1; n < kStride; ++n) latest = std::max(latest, far_end[n]);
  return latest <= query;
}

}  // namespace

const RunPlan& RunPlanner::plan(const RunShape& shape, int32_t batch, int32_t kv_head, int32_t first_query,
                                int32_t end_query, int32_t tile) {
  plan_.batch = batch;
  plan_.kv_head = kv_head;
  plan_.first_query = first_query;
  plan_.end_query = end_query;
  plan_.tile_queries = tile;
  plan_.num_tiles = (end_query - first_query + tile - 1) / tile;
  plan_.first_band_row = shape.window_begin[first_query];
  plan_.end_band_row = shape.num_carried + end_query;
  plan_.panel_shift = (kPanelKeys - (shape.num_carried + first_query) % kPanelKeys) % kPanelKeys;
  plan_.ring_panels = 1;
  arrivals_.clear();
  tile_arrivals_.assign(1, 0);
  tile_slots_.clear();
  slot_end_.clear();

  // Rows in front of num_old were visible before this run; most of a long document's are not any more.
  const auto num_old = static_cast<int32_t>(
      std::upper_bound(shape.far_begin, shape.far_begin + shape.seqlen_k, first_query) - shape.far_begin);
  size_t most_slots = 0;
  int32_t row = 0;
  for (int32_t t = 0; t < plan_.num_tiles; ++t) {
    const int32_t tile_first = first_query + t * tile, tile_last = std::min(end_query, tile_first + tile) - 1;
    while (!slot_end_.empty() && slot_end_.back() <= tile_first) slot_end_.pop_back();
    free_slots_.clear();
    for (size_t slot = 0; slot < slot_end_.size(); ++slot) {
      if (slot_end_[slot] <= tile_first) free_slots_.push_back(static_cast<int32_t>(slot));
    }
    size_t next_free = 0;
    // far_begin does not decrease with the row: what is new at this tile stands in front of the rest.
    for (; row < shape.seqlen_k && shape.far_begin[row] <= tile_last; ++row) {
      while (row + kStride < num_old && all_dead(shape.far_end + row, first_query)) row += kStride;
      if (shape.far_end[row] <= std::max(shape.far_begin[row], tile_first)) continue;
      if (next_free == free_slots_.size()) {
        free_slots_.push_back(static_cast<int32_t>(slot_end_.size()));
        slot_end_.push_back(0);
      }
      const int32_t slot = free_slots_[next_free++];
      slot_end_[slot] = shape.far_end[row];
      arrivals_.push_back({row, slot});
    }
    tile_arrivals_.push_back(static_cast<int32_t>(arrivals_.size()));
    tile_slots_.push_back(static_cast<int32_t>(slot_end_.size()));
    most_slots = std::max(most_slots, slot_end_.size());
    const int32_t first_panel = plan_.panel_of(shape.window_begin[tile_first]);
    plan_.ring_panels = std::max(plan_.ring_panels, plan_.panel_of(shape.num_carried + tile_last) - first_panel + 1);
  }
  plan_.max_slots = static_cast<int32_t>((most_slots + kPanelKeys - 1) / kPanelKeys * kPanelKeys);
  plan_.arrivals = arrivals_.data();
  plan_.tile_arrivals = tile_arrivals_.data();
  plan_.tile_slots = tile_slots_.data();
  return plan_;
}

}  // namespace sparsek::cpu
