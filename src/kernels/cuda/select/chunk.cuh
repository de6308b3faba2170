// What a chunk's walk leaves (chunk_walk.cuh): tau, expiries, fractional intervals and the list of far rows.
#pragma once
#include "kernels/cuda/select/chunk_walk.cuh"

namespace sparsek::cuda::selection {

struct Chunk : ChunkWalk {
  using ChunkWalk::ChunkWalk;

  // First query of [from, stop) at which u is below one (kOne) or without weight.
  template <bool kOne>
  __device__ int crossing(float u, int from, int stop) const {
    return partition_point(from, stop, [&](int i) { return kOne ? u - s.tau[i] >= 1.0f : u - s.tau[i] > 0.0f; });
  }

  __device__ void write_fractions(const Entries& e) {
#pragma unroll 1
    for (int n = t; n < num_entries; n += kChunkThreads) {
      const float u = e.u[n];
      const int position = e.position[n], arrives = e.time[n] - 1;
      const bool of_opening = n < pool_entries + kept_opening;
      const int stop = of_opening ? s.document_end[0] : s.document_end[arrives];
      const int ends = of_opening ? opening.end : document_of(p, position).end;
      write_fraction(u, position, arrives, stop, ends, e.left[n]);
    }
    if (opening.end <= first + length) {  // the document ends: also those that no boundary meets
#pragma unroll 1
      for (int rank = t; rank < num_pool; rank += kChunkThreads) {
        if (is_entry(rank)) continue;
        const uint64_t key = pool[rank];
        write_fraction(pool_score(key), static_cast<int>(key & 0xffffffffu), -1, s.document_end[0], opening.end,
                       kNever);
      }
    }
  }
  // arrives -1: in the pool since before. stop: its document's queries in this chunk end there.
  __device__ void write_fraction(float u, int position, int arrives, int stop, int document_end, int left) {
    int begins = -1;
    if (arrives < 0) {
      if (!(u - start.tau > 0.0f)) return;
      if (u - start.tau >= 1.0f) {
        if (u - s.tau[stop - 1] >= 1.0f) return;
        begins = crossing<true>(u, 0, stop);
      }
    } else {
      begins = crossing<true>(u, arrives, stop);
      if (begins == stop) return;
    }
    const int from = max(begins, 0);
    int ends = u - s.tau[stop - 1] > 0.0f ? stop : crossing<false>(u, from, stop);
    if (left < ends) ends = left;
    if (begins >= 0 && ends <= begins) return;  // never a fraction
    const int64_t out = p.out(lane, position);
    if (begins >= 0) p.frac_begin[out] = first + begins;
    if (ends < stop)
      p.frac_end[out] = first + ends;
    else if (document_end <= first + length)
      p.frac_end[out] = document_end;
  }

  // Selected keys: first the pool's that are no entries, then the entries, then sinks. Returns the class in a list; 3:
  // it was selected until the chunk's first query, which does not see it; -1: nothing there.
  __device__ int selected_key(const Entries& e, int n, const uint64_t* keys, int selected_pool, LiveRow& row) {
    const int query_end = first + length;
    row.row = -1;
    if (n < selected_pool) {
      if (is_entry(n)) return -1;
      const uint64_t key = keys[n];
      row = {static_cast<int>(key & 0xffffffffu), 0, opening.end, pool_score(key)};
    } else if (n < selected_pool + num_entries) {
      n -= selected_pool;
      const int time = e.time[n], dropped = e.dropped[n];
      if (time == 0 ? e.pool_rank[n] >= p.topk : dropped == time - 1) return -1;
      const int position = e.position[n];
      const int document_end = n < pool_entries + kept_opening ? opening.end : document_of(p, position).end;
      row = {position, 0, dropped == kNever ? document_end : first + dropped, e.u[n]};
    } else {
      n -= selected_pool + num_entries;
      int position;
      if (n < p.sinks) {  // the opening document's, far since before
        position = opening.begin + n;
        if (position + p.window >= first || position >= opening.end) return -1;
        row = {position, 0, opening.end, INFINITY};
      } else {
        const int time = n - p.sinks;
        if (time >= length) return -1;
        const Document document = p.cu_seqlens ? document_of(p, first + time) : opening;
        position = first + time - p.window;
        if (position < document.begin || position >= document.begin + p.sinks) return -1;
        row = {position, 0, document.end, INFINITY};
      }
    }
    row.begin = row.row + p.window;
    row.end = min(row.end, query_end);
    if (row.end <= first) return 3;
    const float tau_first = s.tau[0], tau_last = s.tau[length - 1];
    if (row.begin > first || row.end < query_end) return 2;
    if (row.u - tau_last >= 1.0f) return 0;
    return row.u - tau_first < 1.0f && row.u - tau_last > 0.0f ? 1 : 2;
  }

  __device__ void write_selected(const Entries& e) {
    const int selected_pool = min(p.topk, num_pool), warp = t / 32, warp_lane = t & 31;
    const int total = selected_pool + num_entries + (p.live.rows && p.sinks > 0 ? p.sinks + length : 0);
    const int each = (total + kChunkThreads - 1) / kChunkThreads * 32, from = warp * each;
    // The pool's keys are read twice: into shared memory, where the sums have served their time.
    uint64_t* keys = reinterpret_cast<uint64_t*>(e.sum);
    const bool cached = selected_pool <= kSharedEntries;
    if (cached) {
#pragma unroll 4
      for (int n = t; n < selected_pool; n += kChunkThreads) keys[n] = pool[n];
    }
    __syncthreads();
    const uint64_t* selected_keys = cached ? keys : pool;
    int seen[3] = {0, 0, 0};
#pragma unroll 1
    for (int base = from; base < min(from + each, total); base += 32) {
      const int n = base + warp_lane;
      LiveRow row;
      const int kind = n < total ? selected_key(e, n, selected_keys, selected_pool, row) : -1;
      for (int k = 0; k < 3; ++k) seen[k] += __popc(__ballot_sync(0xffffffffu, kind == k));
      // expiry: where it is dropped here, or its document ends here.
      if (kind >= 0 && n < selected_pool + num_entries) {
        const bool dropped = n >= selected_pool && e.dropped[n - selected_pool] != kNever;
        if (dropped || row.end < first + length || ends_here(row.row)) p.set_expiry(lane, row.row, row.end);
      }
    }
    if (p.live.rows == nullptr) return;
    if (warp_lane < 3) s.class_count[warp][warp_lane] = warp_lane == 0 ? seen[0] : warp_lane == 1 ? seen[1] : seen[2];
    __syncthreads();
    int at[3], sum = 0;
    const int64_t list = p.slot(lane, c);
    for (int k = 0; k < 3; ++k) {
#pragma unroll 1
      for (int w = 0; w < kChunkThreads / 32; ++w) {
        if (w == warp) at[k] = sum;
        sum += s.class_count[w][k];
      }
      if (k < 2 && t == 0) p.live.classes[list * 2 + k] = sum;
    }
    if (t == 0) p.live.count[list] = sum;
    LiveRow* rows = p.live.rows + list * p.live.capacity;
#pragma unroll 1
    for (int base = from; base < min(from + each, total); base += 32) {
      const int n = base + warp_lane;
      LiveRow row;
      const int kind = n < total ? selected_key(e, n, selected_keys, selected_pool, row) : -1;
      for (int k = 0; k < 3; ++k) {
        const uint32_t votes = __ballot_sync(0xffffffffu, kind == k);
        if (kind == k) rows[at[k] + __popc(votes & lanes_before())] = row;
        at[k] += __popc(votes);
      }
    }
  }
  __device__ bool ends_here(int position) const {
    if (position < opening.end) return opening.end <= first + length;
    return document_of(p, position).end <= first + length;
  }

  // A score that is not finite makes tau NaN from its position to its document's end.
  __device__ void write_tau() {
    const bool any_bad = p.any_bad[p.slot(lane, c)] != 0;
#pragma unroll 1
    for (int i = t; i < length; i += kChunkThreads) {
      bool poisoned = s.document_begin[i] < 0 && start.bad_from != INT32_MAX;
      if (any_bad && !poisoned) {
#pragma unroll 1
        for (int j = max(0, static_cast<int>(s.document_begin[i])); j <= i; ++j)
          poisoned |= !isfinite(p.score(lane, first + j));
      }
      p.tau[p.out(lane, first + i)] = poisoned ? NAN : s.tau[i];
    }
  }

  __device__ void finish(const Entries& e) {
    merge(e);
    search_boundaries(e);
    __syncthreads();
    if ((t & 31) < kWalkersPerWarp) walk(e);
    __syncthreads();
    fill_tau();
    write_tau();
    write_fractions(e);
    write_selected(e);
    __syncthreads();
  }
  __device__ void run() {
    describe();
    keep_arrivals();
    choose_ranges();
    extern __shared__ __align__(16) uint8_t chunk_memory[];
    if (num_entries < kSharedEntries)
      finish(Entries(chunk_memory + sizeof(ChunkShared), kSharedEntries));
    else
      finish(Entries(p.overflow + blockIdx.x * p.overflow_bytes, p.overflow_bytes / kEntryBytes));
  }
};

// Persistent; items in the order of an atomic counter.
__global__ void __launch_bounds__(kChunkThreads, 2) chunk_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) uint8_t chunk_memory[];
  ChunkShared& s = *reinterpret_cast<ChunkShared*>(chunk_memory);
  const int lanes = p.batch * p.heads;
#pragma unroll 1
  while (true) {
    if (threadIdx.x == 0) s.item = atomicAdd(p.next_item, 1);
    __syncthreads();
    const int item = s.item;
    __syncthreads();
    if (item >= lanes * p.num_chunks) return;
    Chunk(p, s, item % lanes, item / lanes).run();
  }
}

}  // namespace sparsek::cuda::selection
