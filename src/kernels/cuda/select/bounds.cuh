// Step 2 of the selection (problem.cuh) for long sequences: bounds below which keys never matter, from the sorted
// chunks.
//
// Let x be a score with f(x) = sum clamp(u - x, 0, 1) >= topk over some of the candidates of a prefix, no more than
// pool_size of them >= x: then tau is at least x there and at every later query of the document (fact a of
// docs/math.md), and keys below x have no weight and are not selected. Or with pool_size keys >= x: then those below
// leave the pool. More than topk keys >= x are asked for besides, so that "more candidates than topk" still shows in
// what is kept. Ties are kept.
#pragma once
#include <cfloat>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/select/problem.cuh"

namespace sparsek::cuda::selection {

// Bound n is of the queries before this chunk and serves the chunks from there to the next one: at rank_kernel's blocks
// 1, 2, .. 8, then four in each doubling. All chunks of a block have the same bound, as its ranks need it.
__host__ __device__ constexpr int bound_chunk(int n) {
  return (n < 3 ? n + 1 : (4 + (n - 3) % 4) << (n - 3) / 4) << kRankLevels;
}
static_assert(bound_chunk(2) == 24 && bound_chunk(7) == 64 && bound_chunk(8) == 80);

// One CTA per (bound, lane): a histogram of the upper half of each chunk of the document (any part of the candidates
// gives a bound), f at the bins' lower edges, and the largest edge that is a bound. Integer sums: repeats agree.
constexpr int kBoundThreads = 1024, kBins = 2 * kBoundThreads;
__global__ void __launch_bounds__(kBoundThreads) bound_kernel(const __grid_constant__ Problem p) {
  constexpr int kWarps = kBoundThreads / 32;
  __shared__ int count[kBins];           // of keys in the bin, then in it and those above
  __shared__ long long weighted[kBins];  // sum of their bins' numbers
  __shared__ int warp_count[kWarps];
  __shared__ long long warp_weighted[kWarps];
  __shared__ uint32_t most_bits, least_bits;
  __shared__ int best;
  const int lane = blockIdx.y, t = threadIdx.x, warp = t / 32, warp_lane = t & 31;
  const int chunk_end = bound_chunk(blockIdx.x), last = chunk_end * p.chunk - 1;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Document document = document_of(p, last);
  const int chunk_begin = document.begin / p.chunk;  // it is the last document of all these chunks
  for (int b = t; b < kBins; b += kBoundThreads) count[b] = 0;
  if (t == 0) most_bits = UINT32_MAX, least_bits = 0, best = -1;
  __syncthreads();
  // Bits ascend where scores descend. The range: from the least of the chunks' middle scores to the largest score.
  for (int c = chunk_begin + t; c < chunk_end; c += kBoundThreads) {
    const uint32_t* bits = p.sorted_bits + p.slot(lane, c) * p.sort_size;
    const uint32_t middle = bits[(p.chunk - 1) / 2];
    atomicMin(&most_bits, bits[0]);
    if (middle != UINT32_MAX) atomicMax(&least_bits, middle);
  }
  __syncthreads();
  const uint32_t lowest = least_bits;  // 0: no chunk is half full
  const double least = lowest > 0 ? from_descending_bits(lowest) : 0, most = from_descending_bits(most_bits);
  const double width = (most - least) / kBins;
  const bool found_range = lowest > 0 && width > 0 && most - least <= FLT_MAX;  // bins are found in floats
  if (found_range) {
    const float scale = static_cast<float>(1 / width), from = static_cast<float>(least);
    const auto add = [&](uint32_t bits) {
      if (bits > lowest) return;
      atomicAdd(&count[min(static_cast<int>((from_descending_bits(bits) - from) * scale), kBins - 1)], 1);
    };
#pragma unroll 1
    for (int c = chunk_begin + warp; c < chunk_end; c += kWarps) {
      const auto* bits = reinterpret_cast<const uint4*>(p.sorted_bits + p.slot(lane, c) * p.sort_size);
#pragma unroll 4
      for (int n = warp_lane; n < (p.chunk + 7) / 8; n += 32) {
        const uint4 four = bits[n];
        add(four.x), add(four.y), add(four.z), add(four.w);
      }
    }
  }
  __syncthreads();
  const int high = kBins - 1 - 2 * t, low = high - 1;  // this thread's bins
  const int high_count = count[high], low_count = count[low], own_count = high_count + low_count;
  const long long high_weighted = static_cast<long long>(high_count) * high,
                  own_weighted = high_weighted + static_cast<long long>(low_count) * low;
  int counted = own_count;
  long long sum = own_weighted;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other_count = __shfl_up_sync(0xffffffffu, counted, step);
    const long long other_sum = __shfl_up_sync(0xffffffffu, sum, step);
    if (warp_lane >= step) counted += other_count, sum += other_sum;
  }
  if (warp_lane == 31) warp_count[warp] = counted, warp_weighted[warp] = sum;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < warp; ++w) counted += warp_count[w], sum += warp_weighted[w];
  count[low] = counted, weighted[low] = sum;
  count[high] = counted - low_count, weighted[high] = sum - own_weighted + high_weighted;
  __syncthreads();
  // A key of bin b weighs at least (b - x) * width at the lower edge of bin x, 1 from `ones` bins on.
  const int ones = found_range ? static_cast<int>(fmin(ceil(1 / width), static_cast<double>(kBins))) : kBins;
  const auto is_bound = [&](int bin) {
    if (count[bin] <= p.topk) return false;
    if (count[bin] >= p.pool_size) return true;
    const bool any = bin + ones < kBins;
    const int num_ones = any ? count[bin + ones] : 0;
    const long long above = any ? weighted[bin + ones] : 0;
    const long long fractions = weighted[bin] - above - static_cast<long long>(bin) * (count[bin] - num_ones);
    return num_ones + static_cast<double>(fractions) * width >= p.topk;
  };
  const int own_best = !found_range ? -1 : is_bound(high) ? high : is_bound(low) ? low : -1;
  const int warp_best = __reduce_max_sync(0xffffffffu, own_best);
  if (warp_lane == 0) atomicMax(&best, warp_best);
  __syncthreads();
  // Room for the rounding of bins, of tau and of root margins, all far below it.
  const double margin = 1e-5 * fmax(1.0, fmax(fabs(least), fabs(most)));
  const float bound = best < 0 ? -INFINITY : __double2float_rd(least + best * width - margin);
  const int serves_end = min(bound_chunk(blockIdx.x + 1), p.num_chunks);
#pragma unroll 1
  for (int c = chunk_end + warp; c < serves_end; c += kWarps) {
    const int64_t slot = p.slot(lane, c);
    const Document closing = document_of(p, min((c + 1) * p.chunk, p.seqlen) - 1);
    const bool serves = bound > -INFINITY && closing.ordinal == document.ordinal;
    if (warp_lane == 0) p.bounds[slot] = serves ? bound : -INFINITY;
    if (!serves) continue;
    const uint32_t* bits = p.sorted_bits + slot * p.sort_size;
    const uint32_t kept_bits = descending_bits(bound);
    const int kept = partition_point_by_warp(0, p.arrivals[slot].count, [&](int n) { return bits[n] <= kept_bits; });
    __syncwarp();  // all have read the count
    if (warp_lane == 0) p.arrivals[slot].count = kept;
  }
}

}  // namespace sparsek::cuda::selection
