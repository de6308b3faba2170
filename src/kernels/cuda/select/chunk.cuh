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

namespace sparsek::cuda::selection {

constexpr int kChunkThreads = 512;
constexpr int kIntervals = 32;
constexpr int kSharedEntries = 2944;  // two CTAs an SM
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
  int class_count[kChunkThreads / 32][3];
  int range_begin[3], range_end[3], band[3];
  int item, kept;
};
static_assert(sizeof(ChunkShared) + kSharedEntries * kEntryBytes <= 113 * 1024);

struct Chunk {
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

  __device__ Chunk(const Problem& p, ChunkShared& s, int lane, int c) : p(p), s(s), lane(lane), c(c), t(threadIdx.x) {}

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
    start = PoolThreshold{0, 0, 0, 0, INT32_MAX, -INFINITY};
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

  // The first pool rank with u <= limit: a warp, 32 places at a time.
  __device__ int pool_rank_below(double limit) const {
    int low = 0, high = num_pool;
#pragma unroll 1
    while (low < high) {
      const int step = (high - low + 31) / 32, at = low + (t & 31) * step;
      const int count = __popc(__ballot_sync(0xffffffffu, at < high && pool_u(at) > limit));
      if (count == 0) break;
      high = min(high, low + count * step);
      low += (count - 1) * step + 1;
    }
    return low;
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

  // Keys present when an interval starts that rank before an entry of the segment (plus what earlier documents bring),
  // and the sum of their values; pool keys that are no entries are counted but not summed.
  __device__ int keys_before(const Entries& e, const Segment& g, int interval, int at, double& sum) const {
    const int rank = e.rank[at], block = rank >> block_shift, starts = interval * interval_length();
    int count = s.block_count[block][interval];
    sum = s.block_sum[block][interval] + e.sum[at];
#pragma unroll 4
    for (int r = block << block_shift; r < rank; ++r) {
      if (s.arrival_time[r] <= starts) ++count, sum += value(s.arrival_u[r]);
    }
    return count + (!g.has_pool ? 0 : at == g.end ? num_pool : e.pool_rank[at]);
  }
  // What the pool keys that were fractional at the chunk's start add to the sum over the entries up to the segment's
  // end.
  __device__ double old_fractions(const Entries& e, const Segment& g) const {
    if (!g.has_pool || start.count <= p.topk) return 0;
    const int old_ones = partition_point(g.begin, g.end, [&](int n) { return e.pool_rank[n] < start.num_ones; });
    return start.fraction_sum + e.sum[old_ones] - e.sum[g.end];
  }

  // partition_point by groups of four neighbouring threads; all of the warp must come.
  template <class Before>
  __device__ static int partition_point_by_four(int low, int high, Before&& before) {
    const int q = threadIdx.x & 3, group = threadIdx.x & 28;
#pragma unroll 1
    while (__any_sync(0xffffffffu, low < high)) {
      const int width = (high - low + 4) / 5, at = low + (q + 1) * width - 1;
      const bool holds = low < high && at < high && before(at);
      const int count = __popc(__ballot_sync(0xffffffffu, holds) >> group & 15);
      if (low >= high) continue;
      if (count < 4) high = min(high, low + (count + 1) * width - 1);
      low += count * width;
    }
    return low;
  }

  // The state when an interval starts, four threads each for the end of the support, that of the ones, the last
  // selected key and the pool's last: searches in what the keys there and before contribute.
  __device__ void search_boundaries(const Entries& e) {
    static_assert(kChunkThreads == 4 * kIntervals * 4);
    const int what = t / (4 * kIntervals), interval = t % (4 * kIntervals) / 4, starts = interval * interval_length();
    const bool inside = starts < length && s.document_begin[min(starts, length - 1)] != starts;
    Segment g{0, 0, false};
    int present = 0, before_first = 0;
    double sum_first = 0, unused;
    if (inside) {
      g = segment_of(starts);
      if (!g.has_pool) before_first = keys_before(e, g, interval, g.begin, sum_first);
      present = keys_before(e, g, interval, g.end, unused) - before_first;
    }
    // Where tau begins inside the interval, walking there would visit every selected key: search behind that query
    // instead.
    int crossing = -1;
    if (inside && present <= p.topk) {
      int missing = p.topk + 1 - present;
#pragma unroll 1
      for (int i = starts; i < min(starts + interval_length(), length) && missing > 0; ++i) {
        if (s.document_begin[i] != s.document_begin[starts]) break;
        if (s.entry[gapped(i)] >= 0 && --missing == 0) crossing = i;
      }
    }
    const auto keys_searched = [&](int at, double& sum) {
      int count = keys_before(e, g, interval, at, sum) - before_first;
#pragma unroll 1
      for (int i = starts; i <= crossing; ++i) {
        const int x = s.entry[gapped(i)];
        if (x >= 0 && x < at) ++count, sum += value(e.u[x]);
      }
      return count;
    };
    const auto place = [&](bool wanted, int rank) {
      return partition_point_by_four(g.begin, wanted ? g.end : g.begin, [&](int n) {
        return keys_before(e, g, interval, n + 1, unused) - before_first < rank;
      });
    };
    const auto u = [&](int n) { return e.u[n]; };
    int result = -1;
    if (what == 2) {
      const int found = place(present >= p.topk, p.topk);
      if (present >= p.topk) result = found;
    } else {
      const bool full = present >= p.pool_size;
      const int edge = place(full, p.pool_size), limit = full ? edge + 1 : g.end;
      if (what == 3) {
        if (full) result = edge;
      } else {
        const bool searched = crossing >= 0 || (present > p.topk && !(g.has_pool && kept_opening == 0));
        // Values that the boundaries can take in this chunk; between these bands the entries have gaps.
        int ones_low = g.begin, ones_high = g.end, support_low = g.begin;
        if (searched && g.has_pool && opening.end >= first + length) {
          const double margin = 1e-5 * fmax(1.0, fmax(start.count > p.topk ? fabs(static_cast<double>(start.tau)) : 0.0,
                                                      fabs(static_cast<double>(end.tau))));
          support_low = first_not_above(u, g.begin, g.end, end.tau + margin);
          ones_low = first_not_above(u, g.begin, g.end, end.tau + 1.0 + margin);
          if (start.count > p.topk) ones_high = first_below(u, g.begin, g.end, start.tau + 1.0 - margin);
        }
        ones_low = min(ones_low, limit), ones_high = min(ones_high, limit), support_low = min(support_low, limit);
        const double old = searched ? old_fractions(e, g) : 0;
        const auto below = [&](int n) {
          const double x = what == 0 ? static_cast<double>(e.u[n]) : e.u[n] - 1.0;
          const int ones = what == 0 ? first_below(u, ones_low, ones_high, x + 1) : n;
          const int support = what == 0 ? n : first_not_above(u, support_low, limit, x);
          double sum_ones, sum_support;
          const int num_ones = keys_searched(ones, sum_ones);
          const int num_support = keys_searched(support, sum_support);
          const double fractions = old + sum_support - sum_ones - (num_support - num_ones) * (x - reference);
          return num_ones + fractions < p.topk - kRootMargin;
        };
        const int low = what == 0 ? support_low : ones_low, high = what == 0 ? limit : ones_high;
        const int found = partition_point_by_four(searched ? low : 0, searched ? high : 0, below);
        result = searched ? found : g.end;
      }
    }
    if ((t & 3) != 0 || !inside) return;
    Boundary& b = s.boundary[interval];
    if (what == 0) {
      b.support = result;
      double sum;
      b.num_support = keys_searched(result, sum);
      b.sum_support = sum + old_fractions(e, g);
      b.crossing = crossing;
    } else if (what == 1) {
      b.ones = result;
      double sum;
      b.num_ones = keys_searched(result, sum);
      b.sum_ones = sum;
    } else if (what == 2) {
      b.kth = result, b.present = present;
    } else {
      b.edge = result;
    }
  }

  // One thread per interval, from event to event. tau rises from breakpoint to breakpoint (a key leaves at u, becomes a
  // fraction at u - 1) until sum p is topk again; fill_tau divides.
  __device__ void walk(const Entries& e) {
    const int interval = t, begin = min(interval * interval_length(), length),
              stop = min(begin + interval_length(), length);
    double* numerators = &s.block_sum[0][0];
    const bool documents = s.document_begin[0] == 0 || s.document_begin[length - 1] != s.document_begin[0];
    Segment g{0, 0, false};
    int time = begin;
    const auto value_of = [&](int n) { return value(e.u[n]); };
    const auto previous = [&](int n) {
#pragma unroll 1
      do --n;
      while (n >= g.begin && e.time[n] > time + 1);
      return n >= g.begin ? n : -1;
    };
    int ones = 0, support = 0, kth = -1, edge = -1;  // entries, as Boundary
    int num_ones = 0, num_fractional = 0, live = 0;
    int last_one = -1, last_fractional = -1, crossing = -1;
    double sum = 0, leave = INFINITY,
           fill = INFINITY;  // where the last fraction leaves, where the last one becomes a fraction
    const auto load_boundary = [&] {
      const Boundary& b = s.boundary[interval];
      ones = b.ones, support = b.support;
      num_ones = b.num_ones;
      num_fractional = b.num_support - b.num_ones;
      sum = num_fractional == 0 ? 0 : b.sum_support - b.sum_ones;
      last_one = previous(ones);
      last_fractional = num_fractional > 0 ? previous(support) : -1;
      leave = last_fractional >= 0 ? value_of(last_fractional) : INFINITY;
      fill = last_one >= 0 ? value_of(last_one) - 1 : INFINITY;
    };
    if (begin < stop && s.document_begin[begin] != begin) {  // the document goes on
      g = segment_of(begin);
      const Boundary& b = s.boundary[interval];
      kth = b.kth, edge = b.edge;
      live = min(b.present, p.pool_size);
      time = begin - 1;  // as the query before saw it
      crossing = b.crossing;
      if (crossing < 0) load_boundary();
    }
    __syncwarp();  // block_sum is free
#pragma unroll 1
    for (time = begin; time < stop; ++time) {
      const uint32_t events = s.events[time >> 5] >> (time & 31);
      if (events == 0) {
        time |= 31;
        continue;
      }
      time += __ffs(events) - 1;
      if (time >= stop) break;
      if (documents && s.document_begin[time] == time) {
        g = segment_of(time);
        ones = support = g.end;
        kth = edge = last_one = last_fractional = -1;
        num_ones = num_fractional = live = 0;
        sum = 0;
        leave = fill = INFINITY;
      }
      const int at = gapped(time), x = s.entry[at];
      s.entry[at] = -1;
      if (x >= 0 && live == p.pool_size && x > edge) {
        e.left[x] = e.dropped[x] = static_cast<uint16_t>(time);
      } else if (x >= 0) {
        const bool selects_all = live < p.topk;
        if (live == p.pool_size) {
          e.left[edge] = static_cast<uint16_t>(time);
          if (edge < support) {
            support = edge;
            sum -= value_of(edge);
            if (--num_fractional == 0) sum = 0;
            if (last_fractional == edge) {
              last_fractional = num_fractional > 0 ? previous(edge) : -1;
              leave = last_fractional >= 0 ? value_of(last_fractional) : INFINITY;
            }
          }
          edge = previous(edge);
        } else if (++live == p.pool_size) {
          edge = previous(g.end);
        }
        if (x < ones) {
          ++num_ones;
          if (x > last_one) last_one = x, fill = value_of(x) - 1;
        } else if (x < support) {
          const double v = value_of(x);
          sum += v;
          if (num_fractional++ == 0 || x > last_fractional) last_fractional = x, leave = v;
        }
        if (selects_all) {
          if (live == p.topk) kth = previous(g.end);
        } else if (x < kth) {
          e.dropped[kth] = static_cast<uint16_t>(time);
          kth = previous(kth);
        } else {
          e.dropped[x] = static_cast<uint16_t>(time);
        }
      }
      if (x < 0 || live <= p.topk) continue;
      if (time == crossing) load_boundary();
      double excess = num_ones - p.topk + kRootMargin, fractional = num_fractional;  // conversions are slow
#pragma unroll 1
      for (;;) {
        const bool leaves = leave <= fill;
        const double next = leaves ? leave : fill;
        if (next == INFINITY || fma(-fractional, next, excess + sum) < 0) break;
        // One path for both: threads that take different ones would wait for each other.
        const int key = leaves ? last_fractional : last_one, remaining = (leaves ? num_fractional : num_ones) - 1;
        int above = previous(key);
        if (remaining == 0) above = -1;
        const double bound = above >= 0 ? value_of(above) - (leaves ? 0.0 : 1.0) : INFINITY;
        if (leaves) {
          support = key, last_fractional = above, leave = bound;
          num_fractional = remaining, fractional -= 1;
          sum = remaining == 0 ? 0 : sum - next;
        } else {
          if (num_fractional == 0) last_fractional = key, leave = next + 1;
          ones = key, last_one = above, fill = bound;
          num_ones = remaining, excess -= 1;
          ++num_fractional, fractional += 1;
          sum += next + 1;
        }
      }
      numerators[at] = num_fractional > 0 ? sum + (num_ones - p.topk) : fill;
      s.entry[at] = max(num_fractional, 1);
    }
  }

  // tau at every query: it never decreases inside a document.
  __device__ void fill_tau() {
    const double* numerators = &s.block_sum[0][0];
    const int warp_lane = t & 31;
    const auto scan = [&](float& tau, int& begins) {  // the largest since a document began
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, tau, step);
        const int other_begins = __shfl_up_sync(0xffffffffu, begins, step);
        if (warp_lane >= step && !begins) tau = fmaxf(tau, other), begins = other_begins;
      }
    };
#pragma unroll 1
    for (int i = t; i < kMaxChunk; i += kChunkThreads) {
      const int denominator = s.entry[gapped(i)];
      float tau = denominator > 0 && i < length ? static_cast<float>(reference + numerators[gapped(i)] / denominator)
                                                : -INFINITY;
      int begins = i < length && s.document_begin[i] == i;
      scan(tau, begins);
      s.tau[i] = tau;
      if (warp_lane == 31) s.row_tau[i >> 5] = tau, s.row_begins[i >> 5] = begins;
    }
    __syncthreads();
    if (t < 32) {
      float tau = s.row_tau[t];
      int begins = s.row_begins[t];
      if (t == 0 && !begins) tau = fmaxf(tau, start.tau);
      scan(tau, begins);
      s.row_tau[t] = tau;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = t; i < length; i += kChunkThreads) {
      const int begin = s.document_begin[i];
      float tau = s.tau[i];
      if (begin < (i & ~31)) tau = fmaxf(tau, i < 32 ? start.tau : s.row_tau[(i >> 5) - 1]);
      if (begin == s.document_begin[length - 1]) tau = i == length - 1 ? end.tau : fminf(tau, end.tau);
      s.tau[i] = tau;
    }
    __syncthreads();
  }

  // --- results

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
    if (t < kIntervals) walk(e);
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
