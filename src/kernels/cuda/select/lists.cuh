// Step 4 of the selection (problem.cuh): the lists of far rows, once every key's expiry is known.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/select/problem.cuh"

namespace sparsek::cuda::selection {

// One CTA per (list, lane). Candidates: the pool's first topk keys behind the query before the list's first, that
// query's document's sinks, and the keys that leave the window at the list's queries.
constexpr int kListThreads = 1024;
__global__ void __launch_bounds__(kListThreads, 2048 / kListThreads) list_kernel(const __grid_constant__ Problem p) {
  constexpr int kWarps = kListThreads / 32;
  static_assert(kWarps == 32);
  __shared__ int class_count[3][kWarps];
  const int list = blockIdx.x, lane = blockIdx.y, t = threadIdx.x, warp = t / 32, warp_lane = t & 31;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int chunk = list * p.chunks_per_list, first = chunk * p.chunk,
            length = min(p.chunk * p.chunks_per_list, p.seqlen - first), query_end = first + length;
  const Document opening = document_of(p, first);
  const bool has_pool = opening.begin < first;
  const int64_t before = p.slot(lane, chunk - (has_pool ? 1 : 0));
  const uint64_t* pool = p.pools[final_buffer(chunk - (has_pool ? 1 : 0))] + before * p.pool_size;
  const int pool_places = has_pool ? min(p.topk, p.pool_size) : 0;
  const int selected = p.thresholds[before].count;  // with pool_places
  // A key is still selected behind the list's last query if it ranks no later than the last one selected there.
  const uint64_t last_selected =
      opening.end < query_end ? 0 : p.thresholds[p.slot(lane, (query_end - 1) / p.chunk)].last_selected;
  const float tau_first = p.tau[p.out(lane, first)], tau_last = p.tau[p.out(lane, query_end - 1)];
  const int total = pool_places + p.sinks + length, each = (total + kListThreads - 1) / kListThreads * 32,
            from = min(warp * each, total), to = min(from + each, total);
  // The class of candidate n (kernels/cuda/live_rows.h); -1: no query of the list sees it.
  const auto candidate = [&](int n, LiveRow& row) {
    if (n < pool_places) {
      const uint64_t key = pool[n];  // may be nothing
      if (n >= selected) return -1;
      row.row = static_cast<int>(key & 0xffffffffu), row.u = pool_score(key);
      row.end = key <= last_selected ? query_end : p.expiry_of(lane, row.row);
    } else if (n < pool_places + p.sinks) {
      row.row = opening.begin + n - pool_places, row.u = INFINITY, row.end = opening.end;
      if (row.row + p.window >= first || row.row >= opening.end) return -1;
    } else {
      const int query = first + n - pool_places - p.sinks;
      const Document document = p.cu_seqlens ? document_of(p, query) : opening;
      row.row = query - p.window;
      if (row.row < document.begin) return -1;
      const bool sink = row.row < document.begin + p.sinks;
      // row_scores is by head: the scores of a key's other heads are not loaded with it.
      row.u = sink           ? INFINITY
              : p.row_scores ? p.row_scores[static_cast<int64_t>(lane) * p.seqlen + row.row]
                             : p.score(lane, row.row);
      row.end = sink ? document.end : p.expiry_of(lane, row.row);
    }
    row.begin = row.row + p.window;
    row.end = min(row.end, query_end);
    if (row.end <= max(row.begin, first)) return -1;
    if (row.begin > first || row.end < query_end) return 2;
    if (row.u - tau_last >= 1.0f) return 0;
    return row.u - tau_first < 1.0f && row.u - tau_last > 0.0f ? 1 : 2;
  };
  // Most lists keep what they found; longer ones find it twice.
  constexpr int kKept = 2;
  LiveRow row[kKept];
  int kind[kKept], seen[3] = {0, 0, 0};
  const auto count = [&](int found) {
#pragma unroll
    for (int k = 0; k < 3; ++k) seen[k] += __popc(__ballot_sync(0xffffffffu, found == k));
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n) {
    const int place = from + n * 32 + warp_lane;
    kind[n] = place < to ? candidate(place, row[n]) : -1;
  }
#pragma unroll
  for (int n = 0; n < kKept; ++n) count(kind[n]);
#pragma unroll 1
  for (int base = from + kKept * 32; base < to; base += 32) {
    LiveRow other;
    count(base + warp_lane < to ? candidate(base + warp_lane, other) : -1);
  }
  if (warp_lane == 0) {
#pragma unroll
    for (int k = 0; k < 3; ++k) class_count[k][warp] = seen[k];
  }
  __syncthreads();
  int at[3], sum = 0;
  const int64_t slot = static_cast<int64_t>(lane) * p.num_lists + list;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int own = class_count[k][warp_lane];
    at[k] = sum + __reduce_add_sync(0xffffffffu, warp_lane < warp ? own : 0);
    sum += __reduce_add_sync(0xffffffffu, own);
    if (k < 2 && t == 0) p.live.classes[slot * 2 + k] = min(sum, p.live.capacity);
  }
  // No list of documents overflows; starts that do not rise, which nobody checked, name a row twice.
  if (t == 0) p.live.count[slot] = min(sum, p.live.capacity);
  LiveRow* rows = p.live.rows + slot * p.live.capacity;
  const auto write = [&](int found, const LiveRow& x) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const uint32_t votes = __ballot_sync(0xffffffffu, found == k);
      const int place = at[k] + __popc(votes & ((1u << warp_lane) - 1));
      if (found == k && place < p.live.capacity) rows[place] = x;
      at[k] += __popc(votes);
    }
  };
#pragma unroll
  for (int n = 0; n < kKept; ++n) write(kind[n], row[n]);
#pragma unroll 1
  for (int base = from + kKept * 32; base < to; base += 32) {
    LiveRow other;
    const int found = base + warp_lane < to ? candidate(base + warp_lane, other) : -1;
    write(found, other);
  }
}

}  // namespace sparsek::cuda::selection
