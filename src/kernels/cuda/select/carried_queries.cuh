// The third kernel of select_chunk: at each query tau, the topk-th and the pool_size-th key (docs/math.md section 7,
// without a walk). A CTA takes 32 queries: what they all have in common is one sorted list with prefix sums, and the at
// most 32 keys that arrive between them are looked at one by one. A warp per query.
#pragma once
#include "kernels/cuda/select/carried.cuh"

namespace sparsek::cuda::selection {

constexpr int kQueryWarps = 16, kQueryThreads = 32 * kQueryWarps;
constexpr int kListCache = 4096, kListPrefixes = 1024;

struct QueryShared {
  uint64_t list[kListCache + kListCache / 8];  // gaps against bank conflicts
  union {
    uint64_t arrivals[kStretch];
    double prefix[kListPrefixes + kListPrefixes / 4 + 1];
  };
  uint64_t fresh[kPiece];  // arrivals between the queries, by rank
  double fresh_u[kPiece];
  int32_t fresh_place[kPiece];  // keys of the list before it
  uint64_t kth[kPiece];
  double warp_sum[kQueryWarps];
  int warp_count[2][kQueryWarps];
};

struct PieceOfQueries {
  const CarriedProblem& p;
  QueryShared& s;
  const int lane, first, stretch, t = threadIdx.x, warp = threadIdx.x / 32, w = threadIdx.x & 31;
  uint64_t* list;
  int count = 0, num_fresh = 0, shift = 2;  // of the list; one prefix sum every 2^shift keys
  double reference = 0;
  float least = 0, most = 0;

  __device__ PieceOfQueries(const CarriedProblem& p, QueryShared& s, int lane, int piece)
      : p(p),
        s(s),
        lane(lane),
        first(piece * kPiece),
        stretch(piece * kPiece / kStretch),
        list(p.limit <= kListCache ? s.list : p.lists + blockIdx.x * (int64_t{p.limit} + p.limit / 8 + 1)) {}

  __device__ uint64_t& key(int n) const { return list[n + (n >> 3)]; }
  __device__ float u(int n) const { return score_of(key(n)); }
  __device__ int query_of(uint64_t arrival) const { return identity_of(arrival) - p.params.pool_capacity; }

  // Arrivals of the stretch before the piece, into s.arrivals, and those in it, into s.fresh; both stay by rank.
  __device__ int split_arrivals() {
    static_assert(kStretch == 2 * kQueryThreads);
    const uint64_t* sorted = p.sorted + p.stretch(lane, stretch) * kStretch;
    uint64_t own[2];
    int before[2] = {0, 0};  // of the thread's two keys: earlier ones, fresh ones
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      own[n] = sorted[2 * t + n];
      if (own[n] != kNoKey && query_of(own[n]) >= first + kPiece) own[n] = kNoKey;
      const bool there = own[n] != kNoKey, is_fresh = there && query_of(own[n]) >= first;
      before[0] += there && !is_fresh;
      before[1] += is_fresh;
    }
    int at[2];
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      int sum = before[kind];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (w >= step) sum += other;
      }
      if (w == 31) s.warp_count[kind][warp] = sum;
      at[kind] = sum - before[kind];
    }
    __syncthreads();
    int total[2] = {0, 0};
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
#pragma unroll 1
      for (int n = 0; n < kQueryWarps; ++n) {
        if (n == warp) at[kind] += total[kind];
        total[kind] += s.warp_count[kind][n];
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (own[n] == kNoKey) continue;
      if (query_of(own[n]) < first) {
        s.arrivals[at[0]++] = own[n];
      } else {
        s.fresh[at[1]++] = own[n];
      }
    }
    num_fresh = total[1];
    __syncthreads();
    return total[0];
  }

  // The best keys that all queries of the piece have.
  __device__ void make_list() {
    const int num_arrivals = split_arrivals();
    const uint64_t* pool = p.pools + p.pool(lane, stretch) * p.limit;
    const int num_pool = p.pool_counts[p.pool(lane, stretch)];
#pragma unroll 1
    for (int n = t; n < num_pool; n += kQueryThreads) {
      const uint64_t own = pool[n];
      const int place = n + partition_point(0, num_arrivals, [&](int m) { return s.arrivals[m] < own; });
      if (place < p.limit) key(place) = own;
    }
#pragma unroll 1
    for (int n = t; n < num_arrivals; n += kQueryThreads) {
      const uint64_t own = s.arrivals[n];
      const int place = n + partition_point(0, num_pool, [&](int m) { return pool[m] < own; });
      if (place < p.limit) key(place) = own;
    }
    count = min(num_pool + num_arrivals, p.limit);
    __syncthreads();
    if (t < num_fresh) {
      s.fresh_u[t] = score_of(s.fresh[t]);
      s.fresh_place[t] = partition_point(0, count, [&](int m) { return key(m) < s.fresh[t]; });
    }
    __syncthreads();
  }

  // A warp's view of one query: the lane's fresh key is there, and where it ranks.
  struct Query {
    uint32_t live;    // fresh keys that have arrived, a bit each
    int own_rank;     // of the lane's fresh key, INT32_MAX: not there
    int num_live;     // keys
    uint32_t pooled;  // fresh keys in the pool
    int list_pooled;  // keys of the list in the pool
  };
  __device__ int pool_size() const { return p.params.pool_size > 0 ? p.params.pool_size : INT32_MAX; }
  __device__ Query look(int query) const {
    Query q;
    const bool there = w < num_fresh && query_of(s.fresh[w]) <= query;
    q.live = __ballot_sync(0xffffffffu, there);
    q.own_rank = there ? s.fresh_place[w] + __popc(q.live & ((1u << w) - 1)) : INT32_MAX;
    q.num_live = count + __popc(q.live);
    q.pooled = __ballot_sync(0xffffffffu, q.own_rank < pool_size());
    q.list_pooled = min(count, q.num_live > pool_size() ? pool_size() - __popc(q.pooled) : count);
    return q;
  }
  // The key of a rank (from 0), kNoKey where there are fewer.
  __device__ uint64_t key_of_rank(const Query& q, int rank) const {
    const uint32_t hit = __ballot_sync(0xffffffffu, q.own_rank == rank);
    const int before = __popc(__ballot_sync(0xffffffffu, q.own_rank < rank));
    if (rank >= q.num_live) return kNoKey;
    return hit ? s.fresh[__ffs(hit) - 1] : key(rank - before);
  }

  // Sums are of values around the fractional ones of the piece's queries: others must not cost their digits.
  __device__ double value(int n) const { return fminf(fmaxf(u(n), least), most) - reference; }
  __device__ double& prefix(int g) const { return s.prefix[g + (g >> 2)]; }
  __device__ void make_prefix(float lowest, float highest) {
    reference = lowest, least = lowest - 2, most = highest + 2;
    while (count > kListPrefixes << shift) ++shift;
    const int stride = 1 << shift, groups = (count + stride - 1) >> shift;
    const int each = (groups + kQueryThreads - 1) / kQueryThreads;
    const int from = min(t * each, groups), to = min(from + each, groups);
    double own = 0;  // first the sums since `from`
#pragma unroll 1
    for (int g = from; g < to; ++g) {
      prefix(g) = own;
#pragma unroll 4
      for (int n = g * stride; n < min((g + 1) * stride, count); ++n) own += value(n);
    }
    double sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, sum, step);
      if (w >= step) sum += other;
    }
    if (w == 31) s.warp_sum[warp] = sum;
    __syncthreads();
    double before = sum - own;
#pragma unroll 1
    for (int n = 0; n < warp; ++n) before += s.warp_sum[n];
#pragma unroll 1
    for (int g = from; g < to; ++g) prefix(g) += before;
    if (from < to && to == groups) prefix(groups) = before + own;
    if (groups == 0 && t == 0) prefix(0) = 0;
    __syncthreads();
  }
  __device__ double sum_before(int n) const {
    double sum = prefix(n >> shift);
#pragma unroll 1
    for (int m = n >> shift << shift; m < n; ++m) sum += value(m);
    return sum;
  }

  // Whether sum clamp(u - x, 0, 1) over the query's pool is below topk; each lane asks about its own x. Where x is a
  // key of the list, or one less, the caller knows one of the two places.
  __device__ bool below(const Query& q, double x, int ones, int support) const {
    if (ones < 0) ones = first_below([&](int n) { return u(n); }, 0, q.list_pooled, x + 1);
    if (support < 0) support = first_not_above([&](int n) { return u(n); }, ones, q.list_pooled, x);
    double sum = ones + (sum_before(support) - sum_before(ones)) - (support - ones) * (x - reference);
#pragma unroll 1
    for (uint32_t rest = q.pooled; rest != 0; rest &= rest - 1) {
      sum += fmin(fmax(s.fresh_u[__ffs(rest) - 1] - x, 0.0), 1.0);
    }
    return sum < p.params.topk - kRootMargin;
  }

  // Keys with f(u) < topk are above tau, keys with f(u - 1) < topk above tau + 1: half of the lanes search the list for
  // the end of the one, half for that of the other; then each looks at its own fresh key.
  __device__ float threshold(const Query& q, int& num_support) const {
    constexpr int kSearchers = 16;
    const bool upper = w < kSearchers;  // the support's
    int low[2] = {0, 0}, high[2] = {q.list_pooled, min(q.list_pooled, p.params.topk)};
#pragma unroll 1
    while (low[0] < high[0] || low[1] < high[1]) {
      const int width[2] = {(high[0] - low[0] + kSearchers - 1) / kSearchers,
                            (high[1] - low[1] + kSearchers - 1) / kSearchers};
      const int at = upper ? low[0] + w * width[0] : low[1] + (w - kSearchers) * width[1];
      bool holds = false;
      if (at < (upper ? high[0] : high[1])) {
        holds = upper ? below(q, u(at), -1, at) : below(q, u(at) - 1.0, at, -1);
      }
      const uint32_t votes = __ballot_sync(0xffffffffu, holds);
      const int held[2] = {__popc(votes & 0xffffu), __popc(votes >> 16)};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (held[n] == 0) {
          high[n] = low[n];
        } else {
          high[n] = min(high[n], low[n] + held[n] * width[n]);
          low[n] += (held[n] - 1) * width[n] + 1;
        }
      }
    }
    const int support = low[0], ones = min(low[1], support);
    const bool pooled = q.pooled >> w & 1;
    const double own = pooled ? s.fresh_u[w] : 0.0;
    const bool in_support = pooled && below(q, own, -1, -1);
    const bool is_one = in_support && below(q, own - 1.0, -1, -1);
    const uint32_t fresh_support = __ballot_sync(0xffffffffu, in_support),
                   fresh_ones = __ballot_sync(0xffffffffu, is_one);
    num_support = support + __popc(fresh_support);
    const int num_ones = ones + __popc(fresh_ones), fractional = num_support - num_ones;
    double sum = sum_before(support) - sum_before(ones);
#pragma unroll 1
    for (uint32_t rest = fresh_support & ~fresh_ones; rest != 0; rest &= rest - 1) {
      sum += s.fresh_u[__ffs(rest) - 1] - reference;
    }
    if (fractional > 0) return static_cast<float>(reference + (sum + (num_ones - p.params.topk)) / fractional);
    double last = ones > 0 ? u(ones - 1) : INFINITY;  // the smallest of the ones
#pragma unroll 1
    for (uint32_t rest = fresh_ones; rest != 0; rest &= rest - 1) last = fmin(last, s.fresh_u[__ffs(rest) - 1]);
    return static_cast<float>(last - 1.0);
  }

  __device__ void run() {
    make_list();
    const int topk = p.params.topk, end = min(first + kPiece, p.params.chunk);
    const int64_t row = int64_t{lane} * p.params.chunk;
    float lowest = INFINITY, highest = -INFINITY;
#pragma unroll 1
    for (int query = first + warp; query < end; query += kQueryWarps) {
      const Query q = look(query);
      const uint64_t kth = key_of_rank(q, topk - 1), edge = key_of_rank(q, pool_size() - 1);
      if (w != 0) continue;
      s.kth[query - first] = kth;
      p.kth[row + query] = kth, p.edge[row + query] = edge;
    }
    __syncthreads();
    for (int n = 0; n < end - first; ++n) {
      if (s.kth[n] == kNoKey) continue;
      const float kth = score_of(s.kth[n]);
      lowest = fminf(lowest, kth), highest = fmaxf(highest, kth);
    }
    make_prefix(lowest, highest);
#pragma unroll 1
    for (int query = first + warp; query < end; query += kQueryWarps) {
      const Query q = look(query);
      int num_support = q.num_live;
      float tau = -INFINITY;
      if (min(q.num_live, pool_size()) > topk) tau = threshold(q, num_support);
      if (w != 0) continue;
      p.tau[row + query] = tau;
      if (query == p.params.chunk - 1) p.num_support[lane] = num_support;
    }
    __syncthreads();
  }
};

__global__ void __launch_bounds__(kQueryThreads, 2) carried_query_kernel(const __grid_constant__ CarriedProblem p) {
  __shared__ __align__(16) uint8_t memory[sizeof(QueryShared)];
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < int64_t{p.lanes} * p.pieces; item += gridDim.x) {
    PieceOfQueries(p, *reinterpret_cast<QueryShared*>(memory), static_cast<int>(item / p.pieces),
                   static_cast<int>(item % p.pieces))
        .run();
  }
}

}  // namespace sparsek::cuda::selection
