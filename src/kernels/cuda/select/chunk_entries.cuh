// Step 3 of the selection (problem.cuh): tau at every query of a chunk, when each key leaves the selection, the
// fraction and the pool, and the chunk's list of far rows.
//
// The pool and tau are known at both ends of the chunk and everything moves one way, so only those pool keys matter
// that may cross a boundary meanwhile: near tau, near tau + 1, the last ranks of the selection and of the pool. They
// and the chunk's arrivals are merged by rank into the ENTRIES; all other pool keys are counts and sums. The chunk is
// cut into 32 intervals of queries: the state at the start of each is searched with prefix sums, then a thread per
// interval walks through its queries.
#pragma once
#include "kernels/cuda/select/problem.cuh"
#include "kernels/cuda/shared_memory.h"

namespace sparsek::cuda::selection {

constexpr int kChunkThreads = 512;
constexpr int kIntervals = 32;
constexpr int kEntryBytes = 28;

// One array per member, of capacity + 1 elements. Entries of documents follow each other, each by rank.
struct Entries {
  double* sum;         // of u - reference over the pool entries before
  int32_t* position;   // the key
  int32_t* pool_rank;  // pool keys that rank before it, entries or not
  float* u;
  uint16_t* time;     // queries from the chunk's first before it arrives, plus 1; 0: it is in the pool
  uint16_t* rank;     // arrivals among the entries before it
  uint16_t* dropped;  // query at which it leaves (or never joins) the selection
  uint16_t* left;     // query at which it leaves (or never joins) the pool
  __device__ Entries(uint8_t* memory, int64_t capacity) {
    sum = reinterpret_cast<double*>(memory);
    position = reinterpret_cast<int32_t*>(sum + capacity);
    pool_rank = position + capacity;
    u = reinterpret_cast<float*>(pool_rank + capacity);
    time = reinterpret_cast<uint16_t*>(u + capacity);
    rank = time + capacity;
    dropped = rank + capacity;
    left = dropped + capacity;
  }
};

// Where the walk of an interval starts: entry indices. Keys before `ones` have p = 1, those up to `support` a fraction.
struct Boundary {
  double sum_ones, sum_support;  // of values before them
  int ones, support, num_ones, num_support, kth, edge, present;
  int crossing;  // ones and support are those behind this query, the first with a tau; -1: those of the interval's
                 // start
};

struct ChunkShared {
  float tau[kMaxChunk];
  float arrival_u[kMaxChunk];
  double block_sum[33][kIntervals + 1];  // later: by query, sum u - reference over the fractions - (topk - ones)
  uint16_t block_count[33][kIntervals + 2];
  int32_t entry[kMaxChunk + kIntervals];  // at `gapped`: the key that arrives at a query, -1: none that matters. Later:
                                          // the number of fractions behind that query, -1: tau stays
  uint16_t arrival_time[kMaxChunk];       // as Entries::time, by arrival rank
  int16_t document_begin[kMaxChunk];      // of a query's document, from the chunk's first; -1: before it
  uint16_t document_end[kMaxChunk];       // cut to the chunk
  uint32_t arriving[kMaxChunk / 32];      // bit per query
  uint16_t arriving_before[kMaxChunk / 32];
  uint32_t events[kMaxChunk / 32];  // queries at which a document begins or a key arrives that matters
  float row_tau[kMaxChunk / 32];
  int row_begins[kMaxChunk / 32];
  Boundary boundary[kIntervals];
  double warp_sum[kChunkThreads / 32];
  int range_begin[3], range_end[3], band[3];
  int item, kept;
};
// How many entries are in shared memory; more of them go to global memory. Two CTAs an SM with 228 KB; what a CTA can
// have where it can have no more than 99 KB.
constexpr int kManyEntries = 2944;
constexpr int kFewEntries = (kPortableSharedBytes - static_cast<int>(sizeof(ChunkShared))) / kEntryBytes / 32 * 32;
constexpr int chunk_shared_bytes(int entries) {
  return static_cast<int>(sizeof(ChunkShared)) + entries * kEntryBytes;
}
static_assert(chunk_shared_bytes(kManyEntries) <= 113 * 1024);
constexpr int shared_entries(int max_shared_bytes) {
  return chunk_shared_bytes(kManyEntries) <= max_shared_bytes ? kManyEntries : kFewEntries;
}

struct ChunkEntries {
  const Problem& p;
  ChunkShared& s;
  const int lane, c, t;
  int first, length;  // queries [first, first + length)
  // The first document, the one of the first query, is the only one with a pool.
  Document opening, closing;
  PoolThreshold start, end;  // the opening document's before the first query; the closing document's at the last
  const uint64_t* pool;
  int num_pool;                                                        // keys that can still matter
  int num_opening, kept_opening, num_kept, num_entries, pool_entries;  // arrivals; entries
  double reference;
  float ceiling;    // sums are of value(u)
  int block_shift;  // arrivals are summed in blocks of 8, 16 or 32 by rank

  __device__ ChunkEntries(const Problem& p, ChunkShared& s, int lane, int c)
      : p(p), s(s), lane(lane), c(c), t(threadIdx.x) {}

  // The walking threads are 32 queries apart: a gap keeps them off each other's banks.
  __device__ static int gapped(int time) { return time + (time >> 5); }
  __device__ static uint32_t lanes_before() { return (1u << (threadIdx.x & 31)) - 1; }
  __device__ int before_arriving(int time) const {  // arrivals at queries [0, time)
    return s.arriving_before[time >> 5] + __popc(s.arriving[time >> 5] & ((1u << (time & 31)) - 1));
  }
  __device__ int pool_rank_of(int n) const {  // of the n-th pool entry
    for (int r = 0; r < 3; ++r) {
      const int size = s.range_end[r] - s.range_begin[r];
      if (n < size) return s.range_begin[r] + n;
      n -= size;
    }
    return num_pool;
  }
  __device__ bool is_entry(int pool_rank) const {
    for (int r = 0; r < 3; ++r) {
      if (pool_rank >= s.range_begin[r] && pool_rank < s.range_end[r]) return true;
    }
    return false;
  }
  // Ones never enter a sum, so theirs may be cut off: it would cost the others their digits.
  __device__ double value(float u) const { return fminf(u, ceiling) - reference; }
  __device__ float pool_u(int pool_rank) const { return pool_score(pool[pool_rank]); }

  __device__ void describe() {
    first = c * p.chunk;
    length = min(p.chunk, p.seqlen - first);
    opening = document_of(p, first);
    closing = document_of(p, first + length - 1);
    start = PoolThreshold{0, ~uint64_t{0}, 0, 0, 0, INT32_MAX, -INFINITY};
    if (opening.begin < first) start = p.thresholds[p.slot(lane, c - 1)];
    end = p.thresholds[p.slot(lane, c)];
    if (opening.begin < first) pool = p.pools[final_buffer(c - 1)] + p.slot(lane, c - 1) * p.pool_size;
    num_pool = start.count > p.topk ? start.num_support : start.count;
    reference = start.count > p.topk ? start.tau : end.count > p.topk ? end.tau : 0.0f;

    const bool known_end = opening.end >= first + length && end.count > p.topk;
    ceiling = known_end ? end.tau + 4 : INFINITY;

#pragma unroll 1
    for (int i = t; i < kMaxChunk; i += kChunkThreads) {
      bool arrives = false;
      if (i < length) {
        const Document document = p.cu_seqlens ? document_of(p, first + i) : opening;
        s.document_begin[i] = static_cast<int16_t>(max(document.begin - first, -1));
        s.document_end[i] = static_cast<uint16_t>(min(document.end - first, length));
        arrives = first + i - p.window >= document.begin + p.sinks;
      }
      s.entry[gapped(i)] = -1;
      const uint32_t votes = __ballot_sync(0xffffffffu, arrives);
      if ((t & 31) == 0) s.arriving[i >> 5] = votes;
    }
    __syncthreads();
    if (t < kMaxChunk / 32) {
      const int own = __popc(s.arriving[t]);
      int sum = own;
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (t >= step) sum += other;
      }
      s.arriving_before[t] = static_cast<uint16_t>(sum - own);
    }
    if (t == 0) s.kept = 0;
    __syncthreads();
  }

  // Arrivals that may ever be in the support, by document and rank; the others keep what sort_kernel wrote.
  __device__ void keep_arrivals() {
    const uint64_t* sorted = p.sorted + p.slot(lane, c) * kMaxChunk;
    const int total = s.arriving_before[kMaxChunk / 32 - 1] + __popc(s.arriving[kMaxChunk / 32 - 1]);
    const int opening_end = s.document_end[0];
    num_opening = opening_end >= kMaxChunk ? total : before_arriving(opening_end);
    float least = start.tau;
    if (num_pool >= p.pool_size) least = fmaxf(least, pool_u(p.pool_size - 1));
    uint64_t own[kMaxChunk / kChunkThreads];
    kept_opening = 0;
    for (int n = 0; n < kMaxChunk / kChunkThreads; ++n) {
      const int r = t + n * kChunkThreads;
      own[n] = r < total ? sorted[r] : 0;
      const bool keep = r < num_opening && from_descending_bits(arrival_bits(own[n])) > least;
      kept_opening += __syncthreads_count(keep);
    }
    num_kept = kept_opening + total - num_opening;
    for (int n = 0; n < kMaxChunk / kChunkThreads; ++n) {
      const int r = t + n * kChunkThreads;
      if (r >= total || (r >= kept_opening && r < num_opening)) continue;
      const int to = r < num_opening ? r : r - num_opening + kept_opening;
      s.arrival_u[to] = from_descending_bits(arrival_bits(own[n]));
      s.arrival_time[to] = static_cast<uint16_t>(arrival_time(own[n]) + 1);
    }
  }

  // The first pool rank with u <= limit: all of a warp must come.
  __device__ int pool_rank_below(double limit) const {
    return partition_point_by_warp(0, num_pool, [&](int rank) { return pool_u(rank) > limit; });
  }

  // Which pool ranks become entries.
  __device__ void choose_ranges() {
    const bool partly = opening.end >= first + length && start.count > p.topk && kept_opening > 0;
    if (partly) {
      const double margin =
          1e-5 * fmax(1.0, fmax(fabs(static_cast<double>(start.tau)), fabs(static_cast<double>(end.tau))));
      if (t < 96) {
        const int found = pool_rank_below(t < 32   ? end.tau + 1.0 + margin
                                          : t < 64 ? start.tau + 1.0 - margin
                                                   : end.tau + margin);
        if ((t & 31) == 0) s.band[t / 32] = found;
      }
      __syncthreads();
    }
    if (t == 0) {
      int begin[3] = {0, num_pool, num_pool}, stop[3] = {kept_opening == 0 ? 0 : num_pool, num_pool, num_pool};
      if (partly) {
        begin[0] = s.band[0] - 1, stop[0] = s.band[1] + 1;
        begin[1] = p.topk - kept_opening - 1, stop[1] = p.topk;
        begin[2] = s.band[2] - 1, stop[2] = num_pool;
        if (num_pool + kept_opening >= p.pool_size) begin[2] = min(begin[2], p.pool_size - kept_opening - 1);
        for (int r = 0; r < 3; ++r)
          begin[r] = min(max(begin[r], 0), num_pool), stop[r] = min(max(stop[r], begin[r]), num_pool);
        const auto order = [&](int a, int b) {
          if (begin[a] <= begin[b]) return;
          const int x = begin[a], y = stop[a];
          begin[a] = begin[b], stop[a] = stop[b], begin[b] = x, stop[b] = y;
        };
        order(0, 1), order(1, 2), order(0, 1);
        for (int r = 1; r < 3; ++r) {  // made disjoint
          begin[r] = max(begin[r], stop[r - 1]), stop[r] = max(stop[r], begin[r]);
        }
      }
      for (int r = 0; r < 3; ++r) s.range_begin[r] = begin[r], s.range_end[r] = stop[r];
    }
    __syncthreads();
    pool_entries = 0;
    for (int r = 0; r < 3; ++r) pool_entries += s.range_end[r] - s.range_begin[r];
    num_entries = pool_entries + num_kept;
  }

  __device__ void merge(const Entries& e) {
    uint64_t* keys = reinterpret_cast<uint64_t*>(e.sum);  // until the sums are made
#pragma unroll 1
    for (int n = t; n < pool_entries; n += kChunkThreads) keys[n] = pool[pool_rank_of(n)];
    __syncthreads();
#pragma unroll 1
    for (int n = t; n < pool_entries; n += kChunkThreads) {
      const float u = pool_score(keys[n]);
      const int arrivals = partition_point(0, kept_opening, [&](int r) { return s.arrival_u[r] > u; });
      const int at = n + arrivals;
      e.u[at] = u;
      e.position[at] = static_cast<int32_t>(keys[n] & 0xffffffffu);
      e.pool_rank[at] = pool_rank_of(n);
      e.time[at] = 0;
      e.rank[at] = static_cast<uint16_t>(arrivals);
    }
#pragma unroll 1
    for (int r = t; r < num_kept; r += kChunkThreads) {
      const float u = s.arrival_u[r];
      const int older = r < kept_opening ? partition_point(
                                               0, pool_entries, [&](int n) { return pool_score(keys[n]) >= u; })
                                         : pool_entries;
      const int at = r + older, time = s.arrival_time[r];
      e.u[at] = u;
      e.position[at] = first + time - 1 - p.window;
      e.pool_rank[at] = r < kept_opening ? pool_rank_of(older) : 0;
      e.time[at] = static_cast<uint16_t>(time);
      e.rank[at] = static_cast<uint16_t>(r);
      s.entry[gapped(time - 1)] = at;
    }
#pragma unroll 1
    for (int n = t; n < num_entries; n += kChunkThreads) e.dropped[n] = e.left[n] = kNever;
    if (t == 0) e.rank[num_entries] = static_cast<uint16_t>(num_kept), e.pool_rank[num_entries] = num_pool;
    __syncthreads();
#pragma unroll 1
    for (int i = t; i < kMaxChunk; i += kChunkThreads) {
      const uint32_t votes =
          __ballot_sync(0xffffffffu, i < length && (s.entry[gapped(i)] >= 0 || s.document_begin[i] == i));
      if ((t & 31) == 0) s.events[i >> 5] = votes;
    }
    const int each = (num_entries + kChunkThreads - 1) / kChunkThreads, from = min(t * each, num_entries),
              to = min(from + each, num_entries);
    double own = 0;
#pragma unroll 1
    for (int n = from; n < to; ++n) own += e.time[n] == 0 ? value(e.u[n]) : 0.0;
    double sum = own;
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, sum, step);
      if ((t & 31) >= step) sum += other;
    }
    if ((t & 31) == 31) s.warp_sum[t / 32] = sum;
    __syncthreads();
    double before = sum - own;
#pragma unroll 1
    for (int w = 0; w < t / 32; ++w) before += s.warp_sum[w];
#pragma unroll 1
    for (int n = from; n < to; ++n) {
      e.sum[n] = before;
      before += e.time[n] == 0 ? value(e.u[n]) : 0.0;
    }
    if (t == kChunkThreads - 1) e.sum[num_entries] = before;
    // Of each block of arrivals by rank, how many are there when an interval starts, and their sum; then those before.
    block_shift = num_kept <= 256 ? 3 : num_kept <= 512 ? 4 : 5;
    const int lane32 = t & 31, starts = lane32 * interval_length();
#pragma unroll 1
    for (int block = t / 32; block << block_shift < num_kept; block += kChunkThreads / 32) {
      int count = 0;
      double total = 0;
#pragma unroll 4
      for (int r = block << block_shift; r < min((block + 1) << block_shift, num_kept); ++r) {
        if (s.arrival_time[r] <= starts) ++count, total += value(s.arrival_u[r]);
      }
      s.block_count[block][lane32] = static_cast<uint16_t>(count);
      s.block_sum[block][lane32] = total;
    }
    __syncthreads();
#pragma unroll 1
    for (int interval = t / 32; interval < kIntervals; interval += kChunkThreads / 32) {
      const bool there = lane32 << block_shift < num_kept;
      const int own_count = there ? s.block_count[lane32][interval] : 0;
      const double own_sum = there ? s.block_sum[lane32][interval] : 0.0;
      int count = own_count;
      double total = own_sum;
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const int other_count = __shfl_up_sync(0xffffffffu, count, step);
        const double other_sum = __shfl_up_sync(0xffffffffu, total, step);
        if (lane32 >= step) count += other_count, total += other_sum;
      }
      __syncwarp();  // every row is read before the next one's place is written
      s.block_count[lane32 + 1][interval] = static_cast<uint16_t>(count);
      s.block_sum[lane32 + 1][interval] = total;
      if (lane32 == 0) s.block_count[0][interval] = 0, s.block_sum[0][interval] = 0;
    }
    __syncthreads();
  }

  __device__ int interval_length() const { return (p.chunk + kIntervals - 1) / kIntervals; }

  // The entries of a query's document.
  struct Segment {
    int begin, end;
    bool has_pool;  // the opening document's
  };
  __device__ Segment segment_of(int time) const {
    if (s.document_begin[time] == s.document_begin[0]) return {0, pool_entries + kept_opening, true};
    const int skip = pool_entries + kept_opening - num_opening;
    const int end_time = s.document_end[time];
    const int until = end_time >= kMaxChunk ? num_kept - kept_opening + num_opening : before_arriving(end_time);
    return {skip + before_arriving(s.document_begin[time]), skip + until, false};
  }
};

}  // namespace sparsek::cuda::selection
