// What a chunk's walk leaves (chunk_walk.cuh): tau, expiries and fractional intervals.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/select/chunk_walk.cuh"

namespace sparsek::cuda::selection {

struct Chunk : ChunkWalk {
  using ChunkWalk::ChunkWalk;

  // First query of [from, stop) at which u is below one (kOne) or without weight.
  template <bool kOne>
  __device__ int crossing(float u, int from, int stop) const {
    return partition_point(from, stop, [&](int i) { return kOne ? u - s.tau[i] >= 1.0f : u - s.tau[i] > 0.0f; });
  }

  __device__ void write_keys(const Entries& e) {
#pragma unroll 1
    for (int n = t; n < num_entries; n += kChunkThreads) {
      const float u = e.u[n];
      const int position = e.position[n], arrives = e.time[n] - 1;
      const bool of_opening = n < pool_entries + kept_opening;
      const int stop = of_opening ? s.document_end[0] : s.document_end[arrives];
      const int ends = of_opening ? opening.end : document_of(p, position).end;
      write_fraction(u, position, arrives, stop, ends, e.left[n]);
      const int dropped = e.dropped[n];
      if (arrives < 0 ? e.pool_rank[n] < p.topk : dropped != arrives) {  // it was selected
        if (dropped != kNever)
          p.set_expiry(lane, position, first + dropped);
        else if (ends <= first + length)
          p.set_expiry(lane, position, ends);
      }
    }
    if (opening.end <= first + length) {  // the document ends: also those that no boundary meets
#pragma unroll 1
      for (int rank = t; rank < num_pool; rank += kChunkThreads) {
        if (is_entry(rank)) continue;
        const uint64_t key = pool[rank];
        const int position = static_cast<int>(key & 0xffffffffu);
        write_fraction(pool_score(key), position, -1, s.document_end[0], opening.end, kNever);
        if (rank < p.topk) p.set_expiry(lane, position, opening.end);
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

  // No query of the chunk has a tau: every candidate is selected, at weight 1.
  __device__ bool selects_all() const { return opening.begin == closing.begin && end.count <= p.topk; }
  __device__ void select_all() {
#pragma unroll 1
    for (int i = t; i < length; i += kChunkThreads) s.tau[i] = -INFINITY;
    __syncthreads();
    write_tau();
    if (opening.end == first + length) {
#pragma unroll 1
      for (int j = opening.begin + p.sinks + t; j < opening.end - p.window; j += kChunkThreads)
        p.set_expiry(lane, j, opening.end);
    }
    __syncthreads();
  }

  __device__ void finish(const Entries& e) {
    merge(e);
    search_boundaries(e);
    __syncthreads();
    if ((t & 31) < kWalkersPerWarp) walk(e);
    __syncthreads();
    fill_tau();
    write_tau();
    write_keys(e);
    __syncthreads();
  }
  template <int kSharedEntries>
  __device__ void run() {
    describe();
    if (selects_all()) return select_all();
    keep_arrivals();
    choose_ranges();
    extern __shared__ __align__(16) uint8_t chunk_memory[];
    if (num_entries < kSharedEntries)
      finish(Entries(chunk_memory + sizeof(ChunkShared), kSharedEntries));
    else
      finish(Entries(p.overflow + blockIdx.x * p.overflow_bytes, p.overflow_bytes / kEntryBytes));
  }
};

// Persistent: CTA b begins with item b, then takes what an atomic counter gives. kSharedEntries: shared_entries().
template <int kSharedEntries>
__global__ void __launch_bounds__(kChunkThreads, 2) chunk_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) uint8_t chunk_memory[];
  ChunkShared& s = *reinterpret_cast<ChunkShared*>(chunk_memory);
  const int lanes = p.batch * p.heads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  int item = blockIdx.x;
#pragma unroll 1
  while (item < lanes * p.num_chunks) {
    if (threadIdx.x == 0) s.item = atomicAdd(p.next_item, 1) + gridDim.x;
    Chunk(p, s, item % lanes, item / lanes).run<kSharedEntries>();
    item = s.item;
    __syncthreads();
  }
}

}  // namespace sparsek::cuda::selection
