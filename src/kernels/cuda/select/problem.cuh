// What the selection kernels share: the problem, rank keys, documents, the states between chunks.
//
// A lane is one KV head of one batch row. Its queries are cut into chunks; the key at position i - window becomes a
// candidate ("arrives") at query i. Steps (docs/math.md section 7):
//   1. pools.cuh sort_kernel: each chunk's arrivals by rank.
//   2. bounds.cuh bound_kernel, for long sequences: what can never be in a support leaves the pools.
//      pools.cuh rank_kernel, merge_kernel: "the m best of a prefix" merges associatively, so the pools at all chunk
//      ends are a scan; threshold_kernel: tau there.
//   3. chunk.cuh: inside a chunk everything moves one way from its start to its end (facts a and c).
//   4. lists.cuh: the lists of far rows, each for one or more chunks.
#pragma once
#include <cstdint>

#include "kernels/cuda/documents.cuh"
#include "kernels/cuda/live_rows.h"

namespace sparsek::cuda::selection {

constexpr int kMaxChunk = 1024;  // queries of a chunk
constexpr uint16_t kNever = 0xffff;
constexpr double kRootMargin =
    1e-9;  // of sum p: closer to topk is topk, so that flat roots are found in spite of rounding

// A chunk's own arrivals that belong to the document of its last query.
// bound_kernel takes those below the chunk's bound out of `count`; `sorted` keeps them.
struct ArrivalState {
  int32_t count, before;     // before: arrivals of documents that end in the chunk, which sort_kernel puts first
  int32_t sealed, bad_from;  // as PoolState, of this chunk alone
};
// The pool behind a chunk's last query, of the document of that query: keys below the chunk's bound may be missing.
struct PoolState {
  int32_t count;
  int32_t sealed;    // that document begins in the range of chunks covered so far: nothing older may be merged in
  int32_t bad_from;  // first position of the document with a score that is not finite, or INT32_MAX
};

// eq. 2 on a pool: by rank, num_ones keys have p = 1 and those up to num_support a fraction. Unless count > topk: tau
// -inf, every key a one.
struct PoolThreshold {
  double fraction_sum;     // sum of u - tau over the fractional keys
  uint64_t last_selected;  // keys up to it are selected
  int32_t count, num_ones, num_support, bad_from;
  float tau;
};

struct Problem {
  const float* scores;        // [batch, seqlen, heads] by strides
  const int32_t* cu_seqlens;  // [num_documents + 1] or null
  float* tau;                 // [batch, seqlen, heads] by strides, as the three below
  int32_t *expiry, *frac_begin, *frac_end;
  float* row_scores;             // [lanes, seqlen] or null: +inf for sinks
  int32_t *far_begin, *far_end;  // [lanes, seqlen] or null
  int32_t* window_begin;         // [batch, seqlen] or null
  LiveLists live;                // rows null: not wanted
  uint64_t* sorted;              // [lanes, num_chunks, kMaxChunk] arrival keys
  uint32_t* sorted_bits;         // [lanes, num_chunks, sort_size] of those that ArrivalState counts, then UINT32_MAX
  ArrivalState* arrivals;        // [lanes, num_chunks]
  uint64_t* pools[2];            // [lanes, num_chunks, pool_size] pool keys; which of the two: pool_buffer
  PoolState* states[2];          // [lanes, num_chunks]; the second of both only where merge_kernel runs
  PoolThreshold* thresholds;     // [lanes, num_chunks]
  uint8_t* overflow;             // entries of chunks that outgrow shared memory, one part per CTA
  float* bounds;                 // [lanes, num_chunks] keys below it never matter in the chunk or later; null: unknown
  int32_t* any_bad;              // [lanes, num_chunks] whether some score of the chunk's positions is not finite
  int32_t* next_item;
  int64_t overflow_bytes;  // of a part
  int64_t scores_batch, scores_seq, scores_head, out_batch, out_seq, out_head;
  int32_t batch, seqlen, heads, num_documents, topk, window, sinks, pool_size, chunk, num_chunks;
  int32_t sort_size;  // 256, 512 or 1,024: at least chunk
  int32_t chunks_per_list, num_lists, num_bounds;

  __device__ int64_t slot(int lane, int chunk_index) const {
    return static_cast<int64_t>(lane) * num_chunks + chunk_index;
  }
  __device__ float score(int lane, int position) const {
    return scores[lane / heads * scores_batch + position * scores_seq + lane % heads * scores_head];
  }
  __device__ int64_t out(int lane, int position) const {
    return lane / heads * out_batch + position * out_seq + lane % heads * out_head;
  }
  __device__ int expiry_of(int lane, int position) const {
    return far_end ? far_end[static_cast<int64_t>(lane) * seqlen + position] : expiry[out(lane, position)];
  }
  __device__ void set_expiry(int lane, int position, int expiry_query) const {
    expiry[out(lane, position)] = expiry_query;
    if (far_end) far_end[static_cast<int64_t>(lane) * seqlen + position] = expiry_query;
  }
};

// rank_kernel scans aligned blocks of 2^kRankLevels chunks, merge_kernel what is longer. Which of the two buffers holds
// chunk c's pool once levels below `level` are done: each merge changes it.
constexpr int kRankLevels = 3;
__device__ __forceinline__ int pool_buffer(int c, int level) {
  return __popc((c & ((1u << level) - 1)) >> kRankLevels) & 1;
}
__device__ __forceinline__ int final_buffer(int c) {
  return __popc(c >> kRankLevels) & 1;
}

// Unsigned integers that ascend where scores descend; -0.0 is +0.0. What is not finite counts as 0 (its rows are
// poisoned).
__device__ __forceinline__ uint32_t descending_bits(float u) {
  const uint32_t bits = isfinite(u) ? __float_as_uint(u + 0.0f) : 0;
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float from_descending_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu);
}
// Pool keys: rank order is ascending order; ties go to the smaller position.
__device__ __forceinline__ uint64_t pool_key(uint32_t bits, int position) {
  return uint64_t{bits} << 32 | static_cast<uint32_t>(position);
}
__device__ __forceinline__ float pool_score(uint64_t key) {
  return from_descending_bits(static_cast<uint32_t>(key >> 32));
}
// Arrival keys: by document, then by rank; `time` counts queries from the chunk's first.
__device__ __forceinline__ uint64_t arrival_key(int ordinal, uint32_t bits, int time) {
  return static_cast<uint64_t>(ordinal) << 42 | uint64_t{bits} << 10 | static_cast<uint32_t>(time);
}
__device__ __forceinline__ uint32_t arrival_bits(uint64_t key) {
  return static_cast<uint32_t>(key >> 10);
}
__device__ __forceinline__ int arrival_time(uint64_t key) {
  return static_cast<int>(key & 1023);
}
__device__ __forceinline__ int arrival_ordinal(uint64_t key) {
  return static_cast<int>(key >> 42);
}

__device__ __forceinline__ Document document_of(const Problem& p, int position) {
  return cuda::document_of(p.cu_seqlens, p.num_documents, p.seqlen, position);
}

// The first index in [low, high) at which `before` fails; it must hold up to some point and fail from there.
template <class Before>
__device__ __forceinline__ int partition_point(int low, int high, Before&& before) {
#pragma unroll 1  // code that does not fit the instruction cache costs more
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (before(middle))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The same by a warp, 32 places at a time; all of it must come.
template <class Before>
__device__ __forceinline__ int partition_point_by_warp(int low, int high, Before&& before) {
#pragma unroll 1
  while (low < high) {
    const int step = (high - low + 31) / 32, at = low + static_cast<int>(threadIdx.x & 31) * step;
    const int count = __popc(__ballot_sync(0xffffffffu, at < high && before(at)));
    if (count == 0) break;
    high = min(high, low + count * step);
    low += (count - 1) * step + 1;
  }
  return low;
}

// The first index in [low, high) of descending u with u < x, and with u <= x; compared as floats, exactly.
template <class U>
__device__ __forceinline__ int first_below(const U& u, int low, int high, double x) {
  const float limit = __double2float_ru(x);
  return partition_point(low, high, [&](int n) { return u(n) >= limit; });
}
template <class U>
__device__ __forceinline__ int first_not_above(const U& u, int low, int high, double x) {
  const float limit = __double2float_rd(x);
  return partition_point(low, high, [&](int n) { return u(n) > limit; });
}

}  // namespace sparsek::cuda::selection
