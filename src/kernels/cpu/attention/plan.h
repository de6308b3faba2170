// What one thread does at a time: a run of consecutive query tiles of one (batch row, KV head), and which slot of a
// packed buffer each far row of the run occupies. Rows and their arrays: kernels/params.h. Plain data, no instruction
// sets.
//
// A key that is visible as a far row takes the lowest free slot at the first tile that can see it and keeps it while
// any later query may see it, so that it is packed once a run; at most (visible far rows + tile_queries - 1) slots are
// used.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace sparsek::cpu {

inline constexpr int kPanelKeys = 32;  // keys packed side by side; every count of key columns is a multiple of it

// Far row `row` enters `slot`, whatever that held before is dead.
struct Arrival {
  int32_t row, slot;
};

struct RunPlan {
  int32_t batch = 0, kv_head = 0;
  int32_t first_query = 0, end_query = 0;  // queries [first, end)
  int32_t tile_queries = 0;                // a tile is [first + t * tile_queries, ...)
  int32_t num_tiles = 0;
  int32_t max_slots = 0;                         // multiple of kPanelKeys
  int32_t ring_panels = 0;                       // most panels of window rows that a tile sees
  int32_t first_band_row = 0, end_band_row = 0;  // rows that are in the window of some query of the run
  int32_t panel_shift = 0;                       // window row r is column (r + panel_shift) % kPanelKeys of its panel
  const Arrival* arrivals = nullptr;             // in row order
  const int32_t* tile_arrivals = nullptr;  // [num_tiles + 1] those of tile t: [tile_arrivals[t], tile_arrivals[t + 1])
  const int32_t* tile_slots = nullptr;     // [num_tiles] slots in use, live or not; no multiple of anything

  int32_t panel_of(int32_t row) const { return (row + panel_shift) / kPanelKeys; }
};

// The row arrays of one (batch row, KV head), and what a plan depends on besides them.
struct RunShape {
  const int32_t *window_begin, *far_begin, *far_end;
  int32_t seqlen_q, seqlen_k, num_carried;
};

// Query positions of a tile: the group's heads are stacked as its rows, 64 to 128 of them.
int32_t tile_queries(int32_t group_heads);

// Queries of a run: enough runs to keep many threads busy, long enough that packing a run's first keys costs little. It
// depends on the sizes alone, never on the number of threads, and so do the bits of every result.
int32_t run_queries(int64_t batch_times_kv_heads, int32_t seqlen_q, int32_t tile, int64_t wanted_runs);

class RunPlanner {
 public:
  // Valid until the next call.
  const RunPlan& plan(const RunShape& shape, int32_t batch, int32_t kv_head, int32_t first_query, int32_t end_query,
                      int32_t tile_queries);

 private:
  RunPlan plan_;
  std::vector<Arrival> arrivals_;
  std::vector<int32_t> tile_arrivals_, tile_slots_, slot_end_, free_slots_;
};

}  // namespace sparsek::cpu
