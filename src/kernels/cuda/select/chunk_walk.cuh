// The walk through a chunk (chunk_entries.cuh): the state at the start of each interval, then query by query.
#pragma once
#include "kernels/cuda/select/chunk_entries.cuh"

namespace sparsek::cuda::selection {

// Threads of one warp wait for each other at every step, so all warps take a few intervals (against 8 a warp: T = 4096
// .133 instead of .146 ms, rising scores at 64K .51 instead of .46).
constexpr int kWalkersPerWarp = kIntervals / (kChunkThreads / 32);

struct ChunkWalk : ChunkEntries {
  using ChunkEntries::ChunkEntries;

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
    const int interval = t / 32 * kWalkersPerWarp + (t & 31), begin = min(interval * interval_length(), length),
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
};

}  // namespace sparsek::cuda::selection
