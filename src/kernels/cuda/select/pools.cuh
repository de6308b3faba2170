// Steps 1 and 2 of the selection (problem.cuh): chunks by rank, the pools at all chunk ends, tau there.
#pragma once
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/select/problem.cuh"

namespace sparsek::cuda::selection {

// One CTA per (chunk, lane): bitonic sort, four neighbours a thread. Also what a key that is never selected gets.
constexpr int kSortEach = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSortResident = 1280;  // threads of a multiprocessor; more would spill
#else
constexpr int kSortResident = 2048;
#endif
template <int kSortSize>
__global__ void __launch_bounds__(kSortSize / kSortEach, kSortResident* kSortEach / kSortSize)
    sort_kernel(const __grid_constant__ Problem p) {
  constexpr int kSortThreads = kSortSize / kSortEach;
  __shared__ uint64_t exchange[2][kSortSize];
  __shared__ int bad_from;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int c = blockIdx.x, lane = blockIdx.y, t = threadIdx.x;
  const int first = c * p.chunk, last = min(first + p.chunk, p.seqlen) - 1;
  const Document opening = document_of(p, first), closing = p.cu_seqlens ? document_of(p, last) : opening;
  if (t == 0) bad_from = INT32_MAX;
  if (t == 0 && c == 0 && lane == 0) *p.next_item = 0;
  __syncthreads();
  bool any_bad = false;
#pragma unroll 1
  for (int i = first + t; i <= last; i += kSortThreads) {
    const Document document = p.cu_seqlens ? document_of(p, i) : opening;
    const float own = p.score(lane, i);
    any_bad |= !isfinite(own);
    if (!isfinite(own) && document.ordinal == closing.ordinal) atomicMin(&bad_from, i);
    const int64_t out = p.out(lane, i);
    p.expiry[out] = p.frac_begin[out] = p.frac_end[out] = i + p.window;
    const int64_t row = static_cast<int64_t>(lane) * p.seqlen + i;
    const bool sink = i < document.begin + p.sinks;
    if (p.row_scores) p.row_scores[row] = sink ? INFINITY : own;
    if (p.far_begin) p.far_begin[row] = i + p.window;
    if (p.far_end) p.far_end[row] = sink ? document.end : min(i + p.window, document.end);
    if (p.window_begin && lane % p.heads == 0) {
      p.window_begin[static_cast<int64_t>(lane / p.heads) * p.seqlen + i] = max(document.begin, i - p.window + 1);
    }
  }
  uint64_t key[kSortEach];
#pragma unroll
  for (int n = 0; n < kSortEach; ++n) {
    const int time = n * kSortThreads + t, arriving = first + time - p.window;
    key[n] = ~uint64_t{0};
    if (first + time > last) continue;
    const Document document = p.cu_seqlens ? document_of(p, first + time) : opening;
    if (arriving >= document.begin + p.sinks)
      key[n] = arrival_key(document.ordinal - opening.ordinal, descending_bits(p.score(lane, arriving)), time);
  }
  // Place t * kSortEach + n.
  int buffer = 0;
  const auto order = [](uint64_t& low, uint64_t& high, bool ascending) {
    if ((low > high) == ascending) {
      const uint64_t x = low;
      low = high, high = x;
    }
  };
  for (int size = 2; size <= kSortSize; size *= 2) {
    const bool ascending = (t * kSortEach & size) == 0;
    for (int stride = size / 2; stride >= kSortEach; stride /= 2) {
      const int other_thread = t ^ (stride / kSortEach);
      const bool keep_smaller = ascending == (t < other_thread);
      uint64_t other[kSortEach];
      if (stride >= 32 * kSortEach) {
#pragma unroll
        for (int n = 0; n < kSortEach; ++n) exchange[buffer][n * kSortThreads + t] = key[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kSortEach; ++n) other[n] = exchange[buffer][n * kSortThreads + other_thread];
        buffer ^= 1;
      } else {
#pragma unroll
        for (int n = 0; n < kSortEach; ++n) other[n] = __shfl_xor_sync(0xffffffffu, key[n], stride / kSortEach);
      }
#pragma unroll
      for (int n = 0; n < kSortEach; ++n) key[n] = (key[n] < other[n]) == keep_smaller ? key[n] : other[n];
    }
    if (size >= 4) order(key[0], key[2], ascending), order(key[1], key[3], ascending);
    order(key[0], key[1], ascending), order(key[2], key[3], size == 2 ? false : ascending);
  }
  __syncthreads();
  const int bad = __syncthreads_count(any_bad);
  int total = 0, before = 0;  // before: of documents that end in the chunk
  const int closing_ordinal = closing.ordinal - opening.ordinal;
#pragma unroll
  for (int n = 0; n < kSortEach; ++n) {
    const bool valid = key[n] != ~uint64_t{0};
    before += __syncthreads_count(valid && arrival_ordinal(key[n]) < closing_ordinal);
    total += __syncthreads_count(valid);
    exchange[0][t * kSortEach + n] = key[n];
  }
  __syncthreads();
  const int64_t slot = p.slot(lane, c);
  const int count = min(total - before, p.pool_size);
  for (int r = t; r < total; r += kSortThreads) p.sorted[slot * kMaxChunk + r] = exchange[0][r];
  for (int r = t; r < kSortSize; r += kSortThreads)
    p.sorted_bits[slot * kSortSize + r] = r < count ? arrival_bits(exchange[0][before + r]) : UINT32_MAX;
  if (t == 0) {
    p.arrivals[slot] = {count, before, closing.begin >= first, bad_from};
    p.any_bad[slot] = bad > 0;
  }
}

// The pools behind all chunks of an aligned block of 2^kRankLevels chunks, as far as that block makes them. One CTA per
// (chunk, lane) takes its own arrivals to their ranks in every pool they reach: it counts those that rank before them
// in the chunks before its own, latest first, then chunk by chunk in those behind it, until all its keys are out of the
// pool (with random scores soon). Ties rank by chunk.
constexpr int kRankThreads = 256;
template <int kSortSize>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const __grid_constant__ Problem p) {
  constexpr int kEach = kSortSize / kRankThreads;
  __shared__ uint32_t staged[kSortSize];
  __shared__ int first_chunk, end_chunk;  // whose arrivals and pools are of this chunk's last document
  const int c = blockIdx.x, lane = blockIdx.y, t = threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const ArrivalState own = p.arrivals[p.slot(lane, c)];
  if (t < 32) {
    const int block = c >> kRankLevels << kRankLevels, in_block = c - block, chunk = block + t;
    const bool there = t < 1 << kRankLevels && chunk < p.num_chunks;
    const ArrivalState state = there ? p.arrivals[p.slot(lane, chunk)] : ArrivalState{0, 0, 0, INT32_MAX};
    const uint32_t sealed = __ballot_sync(0xffffffffu, state.sealed != 0), mask = 0xffffffffu >> (31 - in_block);
    const int begin = 31 - __clz(sealed & mask);  // -1: none
    const bool counted = t >= begin && t <= in_block;
    const int count = __reduce_add_sync(0xffffffffu, counted ? state.count : 0),
              bad_from = __reduce_min_sync(0xffffffffu, counted ? state.bad_from : INT32_MAX);
    if (t == 0) {
      const int behind = (sealed & ~mask) == 0 ? 1 << kRankLevels : __ffs(sealed & ~mask) - 1;
      first_chunk = block + max(begin, 0), end_chunk = min(block + behind, p.num_chunks);
      p.states[0][p.slot(lane, c)] = {min(count, p.pool_size), begin >= 0, bad_from};
    }
  }
  constexpr int kOut = INT32_MAX / 2;
  uint32_t bits[kEach], next[kEach];
  int position[kEach], rank[kEach];
  const uint64_t* sorted = p.sorted + p.slot(lane, c) * kMaxChunk + own.before;
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int r = n * kRankThreads + t;
    const uint64_t key = r < own.count ? sorted[r] : ~uint64_t{0};
    bits[n] = arrival_bits(key);
    position[n] = c * p.chunk + arrival_time(key) - p.window;
    rank[n] = r < own.count ? r : kOut;
  }
  __syncthreads();
  const int first = first_chunk, end = end_chunk;
  const auto load = [&](int chunk) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) next[n] = p.sorted_bits[p.slot(lane, chunk) * kSortSize + n * kRankThreads + t];
  };
  const auto write = [&](int chunk) {
    uint64_t* pool = p.pools[0] + p.slot(lane, chunk) * p.pool_size;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      if (rank[n] < p.pool_size) pool[rank[n]] = pool_key(bits[n], position[n]);
    }
  };
  int chunk = c > first ? c - 1 : c, alive = own.count;
  if (chunk < c) load(chunk);
#pragma unroll 1
  while (alive > 0) {
    if (chunk == c) {  // the older ones are counted
      write(c);
      if (++chunk >= end) return;
      load(chunk);
    }
    const int current = chunk;
    const bool older = current < c;
#pragma unroll
    for (int n = 0; n < kEach; ++n) staged[n * kRankThreads + t] = next[n];
    __syncthreads();
    chunk = older ? (current > first ? current - 1 : c) : current + 1;
    if (chunk != c && chunk < end) load(chunk);
    const int reached = alive;
    alive = 0;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      if (n * kRankThreads + (t & ~31) >= reached) break;
      const uint32_t last = older ? bits[n] : bits[n] - 1;  // no score's bits are 0
      int at = 0;
#pragma unroll
      for (int step = kSortSize / 2; step > 0; step /= 2) at += staged[at + step - 1] <= last ? step : 0;
      at += staged[at] <= last;
      rank[n] = min(rank[n] + at, kOut);
    }
    if (!older) write(current);
#pragma unroll
    for (int n = 0; n < kEach; ++n) {  // ranks ascend: the keys that stay are the first ones
      if (n * kRankThreads < reached) alive += __syncthreads_count(rank[n] < p.pool_size);
    }
    if (!older && chunk >= end) return;
  }
}

// Level l of an inclusive scan over chunks (Sklansky): chunk c with bit l set takes in all of the 2^l chunks before
// its own 2^l. One CTA per tile of the result.
constexpr int kMergeThreads = 256, kMergeEach = 8, kMergeTile = kMergeThreads * kMergeEach;
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Problem p, int level) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int x = blockIdx.x, c = (x >> level) << (level + 1) | 1 << level | (x & ((1 << level) - 1));
  const int tile = blockIdx.y, lane = blockIdx.z;
  if (c >= p.num_chunks) return;
  const int left_chunk = ((c >> level) << level) - 1;
  const int left_buffer = pool_buffer(left_chunk, level), right_buffer = pool_buffer(c, level),
            out_buffer = right_buffer ^ 1;
  const int64_t slot = p.slot(lane, c), left_slot = p.slot(lane, left_chunk);
  const PoolState left_state = p.states[left_buffer][left_slot], right_state = p.states[right_buffer][slot];
  const uint64_t* left = p.pools[left_buffer] + left_slot * p.pool_size;
  const uint64_t* right = p.pools[right_buffer] + slot * p.pool_size;
  int num_left = right_state.sealed ? 0 : left_state.count;
  const int num_right = right_state.count;
  if (p.bounds != nullptr && p.bounds[slot] > -INFINITY) {  // every warp by itself: no barrier
    const uint64_t behind = pool_key(descending_bits(p.bounds[slot]), -1);
    num_left = partition_point_by_warp(0, num_left, [&](int n) { return left[n] <= behind; });
  }
  const int total = min(p.pool_size, num_left + num_right);
  if (tile == 0 && threadIdx.x == 0) {
    p.states[out_buffer][slot] = {
        total, right_state.sealed | left_state.sealed,
        right_state.sealed ? right_state.bad_from : min(left_state.bad_from, right_state.bad_from)};
  }
  const int begin = tile * kMergeTile, end = min(begin + kMergeTile, total);
  if (begin >= end) return;
  // How many of the first `begin` (warp 0) and `end` (warp 1) come from the left: 32 candidates at a time.
  __shared__ int from_left[2];
  if (threadIdx.x < 64) {
    const int warp_lane = threadIdx.x & 31, diagonal = threadIdx.x < 32 ? begin : end;
    const int found = partition_point_by_warp(max(0, diagonal - num_right), min(diagonal, num_left),
                                              [&](int n) { return left[n] < right[diagonal - 1 - n]; });
    if (warp_lane == 0) from_left[threadIdx.x / 32] = found;
  }
  __syncthreads();
  const int left_begin = from_left[0], left_count = from_left[1] - left_begin;
  const int right_begin = begin - left_begin, count = end - begin;
  // Every left position is smaller than every right one: comparing scores is enough, ties are the left's.
  __shared__ uint32_t bits_gapped[kMergeTile + kMergeTile / 32], position[kMergeTile];  // gaps: bank conflicts
  __shared__ __align__(16) uint16_t source[kMergeTile];
  const auto bits = [&](int n) -> uint32_t& { return bits_gapped[n + n / 32]; };
  for (int n = threadIdx.x; n < count; n += kMergeThreads) {
    const uint64_t key = n < left_count ? left[left_begin + n] : right[right_begin + n - left_count];
    bits(n) = static_cast<uint32_t>(key >> 32), position[n] = static_cast<uint32_t>(key);
  }
  __syncthreads();
  const int diagonal = min(static_cast<int>(threadIdx.x) * kMergeEach, count), right_count = count - left_count;
  int a = partition_point(max(0, diagonal - right_count), min(diagonal, left_count),
                          [&](int n) { return bits(n) <= bits(left_count + diagonal - 1 - n); });
  int b = left_count + diagonal - a;
  uint32_t left_bits = a < left_count ? bits(a) : UINT32_MAX, right_bits = b < count ? bits(b) : UINT32_MAX;
  uint32_t sources[kMergeEach / 2] = {};
#pragma unroll
  for (int n = 0; n < kMergeEach; ++n) {
    const bool take_left = a < left_count && left_bits <= right_bits;
    sources[n / 2] |= static_cast<uint32_t>(take_left ? a : b) << (n % 2 * 16);
    if (take_left) {
      left_bits = ++a < left_count ? bits(a) : UINT32_MAX;
    } else {
      right_bits = ++b < count ? bits(b) : UINT32_MAX;
    }
  }
  reinterpret_cast<uint4*>(source)[threadIdx.x] = {sources[0], sources[1], sources[2], sources[3]};
  __syncthreads();
  uint64_t* to = p.pools[out_buffer] + slot * p.pool_size + begin;
  for (int n = threadIdx.x; n < count; n += kMergeThreads) {
    to[n] = pool_key(bits(source[n]), static_cast<int>(position[source[n]]));
  }
}

// tau of the pool behind each chunk. One CTA per (chunk, lane). Both boundaries are monotone searches for f(x) < topk,
// f(x) = sum clamp(u - x, 0, 1): keys with f(u) < k have u > tau, keys with f(u - 1) < k have u - 1 > tau (at a flat
// root tau is its right end).
constexpr int kThresholdThreads = 256, kPrefixes = 1024, kHeads = 4096;
struct ThresholdShared {
  double prefix_gapped[kPrefixes + kPrefixes / 8 + 1];  // gaps against bank conflicts
  double warp_sum[kThresholdThreads / 32];
  float head_gapped[kHeads + kHeads / 8];
};
__global__ void __launch_bounds__(kThresholdThreads) threshold_kernel(const __grid_constant__ Problem p) {
  __shared__ ThresholdShared shared;
  auto& prefix_gapped = shared.prefix_gapped;
  auto& head_gapped = shared.head_gapped;
  auto& warp_sum = shared.warp_sum;
  const int c = blockIdx.x, lane = blockIdx.y, t = threadIdx.x;
  const int64_t slot = p.slot(lane, c);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const PoolState state = p.states[final_buffer(c)][slot];
  const int count = state.count;
  if (count <= p.topk) {
    if (t == 0) p.thresholds[slot] = {0, ~uint64_t{0}, count, count, count, state.bad_from, -INFINITY};
    return;
  }
  const uint64_t* keys = p.pools[final_buffer(c)] + slot * p.pool_size;
#pragma unroll 4
  for (int n = t; n < min(count, kHeads); n += kThresholdThreads) head_gapped[n + n / 8] = pool_score(keys[n]);
  __syncthreads();
  // Sums are of u - reference, cut off: fractional keys are within 1 of it, and others must not cost their digits.
  const double reference = pool_score(keys[p.topk - 1]);
  int shift = 0;  // one prefix sum every 2^shift keys
  while (count > kPrefixes << shift) ++shift;
  const int stride = 1 << shift, groups = (count + stride - 1) >> shift;
  const auto u = [&](int n) { return n < kHeads ? head_gapped[n + n / 8] : pool_score(keys[n]); };
  const auto prefix = [&](int g) -> double& { return prefix_gapped[g + g / 8]; };
  const float least = pool_score(keys[p.topk - 1]) - 2, most = least + 4;
  const auto value = [&](int n) { return fminf(fmaxf(u(n), least), most) - reference; };
  {
    const int each = (groups + kThresholdThreads - 1) / kThresholdThreads;
    const int from = min(t * each, groups), to = min(from + each, groups);
    double own = 0;  // first the sums since `from`
    for (int g = from; g < to; ++g) {
      prefix(g) = own;
      for (int n = g * stride; n < min((g + 1) * stride, count); ++n) own += value(n);
    }
    double sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(0xffffffffu, sum, step);
      if ((t & 31) >= step) sum += other;
    }
    if ((t & 31) == 31) warp_sum[t / 32] = sum;
    __syncthreads();
    double before = sum - own;
    for (int w = 0; w < t / 32; ++w) before += warp_sum[w];
    for (int g = from; g < to; ++g) prefix(g) += before;
    if (from < to && to == groups) prefix(groups) = before + own;
    __syncthreads();
  }
  const auto sum_before = [&](int n) {
    double sum = prefix(n >> shift);
    for (int m = n >> shift << shift; m < n; ++m) sum += value(m);
    return sum;
  };
  // kSearchers threads search the end of the support, as many that of the ones.
  constexpr int kSearchers = 64;
  const bool support = t < kSearchers;
  const int rank = t & (kSearchers - 1);
  const auto below = [&](int n) {
    const double x = support ? static_cast<double>(u(n)) : u(n) - 1.0;
    const int ones = support ? first_below(u, 0, n, x + 1) : n;
    const int end = support ? n : first_not_above(u, n, count, x);
    return ones + (sum_before(end) - sum_before(ones)) - (end - ones) * (x - reference) < p.topk - kRootMargin;
  };
  int low[2] = {0, 0}, high[2] = {count, count};
  while (low[0] < high[0] || low[1] < high[1]) {
    const int width[2] = {(high[0] - low[0] + kSearchers - 1) / kSearchers,
                          (high[1] - low[1] + kSearchers - 1) / kSearchers};
    bool holds = false;
    if (t < 2 * kSearchers) {
      const int at = support ? low[0] + rank * width[0] : low[1] + rank * width[1];
      holds = at < (support ? high[0] : high[1]) && below(at);
    }
    const int held[2] = {__syncthreads_count(support && holds), __syncthreads_count(!support && holds)};
    for (int n = 0; n < 2; ++n) {
      if (held[n] == 0) {
        high[n] = low[n];
      } else {
        high[n] = min(high[n], low[n] + held[n] * width[n]);
        low[n] += (held[n] - 1) * width[n] + 1;
      }
    }
  }
  if (t == 0) {
    const int num_support = low[0], num_ones = min(low[1], num_support);
    const double sum = sum_before(num_support) - sum_before(num_ones);
    const int fractional = num_support - num_ones;
    const double tau = fractional > 0 ? reference + (sum + (num_ones - p.topk)) / fractional : u(num_ones - 1) - 1.0;
    const float rounded = static_cast<float>(tau);
    p.thresholds[slot] = {sum - fractional * (rounded - reference),
                          keys[p.topk - 1],
                          count,
                          num_ones,
                          num_support,
                          state.bad_from,
                          rounded};
  }
}

}  // namespace sparsek::cuda::selection
