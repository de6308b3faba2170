// The far rows of a query tile: of its chunk's list those that any of its queries sees, in shared memory.
#pragma once
#include "kernels/cuda/portable/matrix.cuh"

namespace sparsek::cuda::portable {

// Lists are walked in rounds of this many candidates.
constexpr int kRound = 2048;

struct FarShared {
  alignas(16) int32_t row[kRound];
  uint16_t interval[kRound];  // visible at the tile's positions [low byte, high byte)
  uint64_t warp_counts[kThreads / 32];
};

// First rows that every query sees at weight 1, then rows that every query sees, then the others, padded to whole
// blocks with a row seen by nobody.
struct FarCounts {
  int plain, full, all;
};

// Candidates [from, from + kRound) of a list of `count`. The tile's queries are [first, last]; the CTA's barriers frame
// the call: nobody reads `s` when it begins, everybody may when it returns.
__device__ __forceinline__ FarCounts gather_far_rows(FarShared& s, const LiveRow* list, int from, int count, int first,
                                                     int last, float tau_last, bool is_soft, int thread) {
  constexpr int kEach = kRound / kThreads;
  const int lane = thread & 31;
  const int4* const rows = reinterpret_cast<const int4*>(list);
  const int to = min(from + kRound, count);
  uint32_t kinds = 0;  // two bits each; 3: not visible
  uint64_t own = 0;    // how many of kind 0, 1, 2; 16 bits each
#pragma unroll 4
  for (int n = 0; n < kEach; ++n) {
    const int candidate = from + n * kThreads + thread;
    uint32_t kind = 3;
    if (candidate < to) {
      const int4 x = __ldg(rows + candidate);
      if (x.y <= last && x.z > first) {
        const bool is_full = x.y <= first && x.z > last;
        kind = !is_full ? 2 : !is_soft || __int_as_float(x.w) - tau_last >= 1.0f ? 0 : 1;
        own += 1ull << (16 * kind);
      }
    }
    kinds |= kind << (2 * n);
  }
  uint64_t before = own;  // first up to and with this thread
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) s.warp_counts[thread / 32] = before;
  before -= own;
  __syncthreads();
  uint64_t total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < thread / 32) before += s.warp_counts[w];
    total += s.warp_counts[w];
  }
  FarCounts counts;
  counts.plain = static_cast<int>(total & 0xffff);
  counts.full = counts.plain + static_cast<int>(total >> 16 & 0xffff);
  counts.all = counts.full + static_cast<int>(total >> 32 & 0xffff);
  uint64_t at = before + (static_cast<uint64_t>(counts.plain) << 16) + (static_cast<uint64_t>(counts.full) << 32);
#pragma unroll 4
  for (int n = 0; n < kEach; ++n) {
    const uint32_t kind = kinds >> (2 * n) & 3;
    if (kind == 3) continue;
    const int4 x = __ldg(rows + from + n * kThreads + thread);
    const int place = static_cast<int>(at >> (16 * kind) & 0xffff);
    at += 1ull << (16 * kind);
    s.row[place] = x.x;
    s.interval[place] = static_cast<uint16_t>(max(0, x.y - first) | min(128, x.z - first) << 8);
  }
  __syncthreads();
  const int padded = (counts.all + kKeys - 1) / kKeys * kKeys;
  for (int n = counts.all + thread; n < padded; n += kThreads) s.row[n] = s.row[counts.all - 1], s.interval[n] = 0;
  __syncthreads();
  return counts;
}

}  // namespace sparsek::cuda::portable
