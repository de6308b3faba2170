#include "kernels/cuda/select/select.h"

#include <algorithm>
#include <cassert>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/select/bounds.cuh"
#include "kernels/cuda/select/chunk.cuh"
#include "kernels/cuda/select/lists.cuh"
#include "kernels/cuda/select/pools.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

// Lists are for chunks of their own length. A chunk costs about the same at any length, so shorter ones are taken
// while all fit onto the device at once (T = 4096, 16 heads: .0975 ms at 256 queries, .135 at 1,024).
int chunks_per_list(int64_t lanes, int seqlen, int list_chunk) {
  for (const int parts : {4, 2}) {
    const int chunk = list_chunk / parts;
    if (list_chunk % parts == 0 && chunk >= 128 &&
        lanes * ((seqlen + chunk - 1) / chunk) <= 2 * num_multiprocessors()) {
      return parts;
    }
  }
  return 1;
}

// Pools of one or two blocks hold few keys that can be left out.
int num_bounds(int num_chunks) {
  if (num_chunks <= 2 << selection::kRankLevels) return 0;
  int count = 0;
  while (selection::bound_chunk(count) < num_chunks) ++count;
  return count;
}

selection::Problem describe(const SelectParams& params, int list_chunk) {
  selection::Problem p{};
  p.scores = static_cast<const float*>(params.scores);
  p.cu_seqlens = params.cu_seqlens;
  p.tau = static_cast<float*>(params.tau);
  p.expiry = params.expiry, p.frac_begin = params.frac_begin, p.frac_end = params.frac_end;
  p.scores_batch = params.scores_strides.batch, p.scores_seq = params.scores_strides.seq,
  p.scores_head = params.scores_strides.head;
  p.out_batch = params.out_strides.batch, p.out_seq = params.out_strides.seq, p.out_head = params.out_strides.head;
  p.batch = params.batch, p.seqlen = params.seqlen, p.heads = params.num_kv_heads,
  p.num_documents = params.num_documents;
  p.topk = params.topk, p.window = params.window_size, p.sinks = params.num_sinks;
  const bool limited = params.pool_size > 0 && params.pool_size < params.seqlen;
  p.pool_size = limited ? params.pool_size : std::max(params.seqlen, std::min(params.topk, params.seqlen) + 1);
  p.chunks_per_list = chunks_per_list(int64_t{p.batch} * p.heads, p.seqlen, list_chunk);
  p.chunk = list_chunk / p.chunks_per_list;
  p.num_chunks = (p.seqlen + p.chunk - 1) / p.chunk, p.num_lists = (p.seqlen + list_chunk - 1) / list_chunk;
  p.num_bounds = num_bounds(p.num_chunks);
  p.sort_size = p.chunk <= 256 ? 256 : p.chunk <= 512 ? 512 : 1024;
  return p;
}

int num_chunk_ctas(const selection::Problem& p) {
  return static_cast<int>(std::min<int64_t>(2 * num_multiprocessors(), int64_t{p.batch} * p.heads * p.num_chunks));
}

int64_t carve(selection::Problem& p, void* workspace) {
  Carver carver(workspace);
  const int64_t slots = int64_t{p.batch} * p.heads * p.num_chunks;
  carver.take(p.sorted, slots * selection::kMaxChunk);
  carver.take(p.sorted_bits, slots * p.sort_size);
  carver.take(p.arrivals, slots);
  const bool merges = p.num_chunks > 1 << selection::kRankLevels;
  for (int n = 0; n < (merges ? 2 : 1); ++n)
    carver.take(p.pools[n], slots * p.pool_size), carver.take(p.states[n], slots);
  carver.take(p.thresholds, slots);
  if (p.num_bounds > 0) carver.take(p.bounds, slots);
  carver.take(p.any_bad, slots);
  carver.take(p.next_item, 1);
  const int64_t entries = int64_t{p.pool_size} + p.chunk + 1;
  const bool fit = entries <= selection::shared_entries(max_shared_bytes());
  p.overflow_bytes = fit ? 0 : (entries + 31) / 32 * 32 * selection::kEntryBytes;
  carver.take(p.overflow, p.overflow_bytes * num_chunk_ctas(p));
  return carver.used_bytes();
}

}  // namespace

int64_t select_workspace_bytes(const SelectParams& params, int chunk) {
  selection::Problem p = describe(params, chunk);
  return carve(p, nullptr);
}

void select(const SelectParams& params, const SelectRows& rows, int chunk, void* workspace, cudaStream_t stream) {
  assert(params.dtype == DType::kF32 && params.topk >= 1 && params.window_size >= 1 && params.num_sinks >= 0 &&
         params.seqlen >= 1);
  assert(chunk >= 1 && chunk <= selection::kMaxChunk);
  selection::Problem p = describe(params, chunk);
  carve(p, workspace);
  p.row_scores = rows.row_scores, p.far_begin = rows.far_begin, p.far_end = rows.far_end,
  p.window_begin = rows.window_begin;
  p.live = rows.live;
  const unsigned lanes = p.batch * p.heads, chunks = p.num_chunks;
  const dim3 each_chunk(chunks, lanes);
  const auto sort_and_rank = [&](auto sort_size) {
    constexpr int kSortSize = decltype(sort_size)::value;
    launch_behind(selection::sort_kernel<kSortSize>, each_chunk, kSortSize / selection::kSortEach, 0, stream, p);
    if (p.num_bounds > 0)
      launch_behind(selection::bound_kernel, dim3(p.num_bounds, lanes), selection::kBoundThreads, 0, stream, p);
    launch_behind(selection::rank_kernel<kSortSize>, each_chunk, selection::kRankThreads, 0, stream, p);
  };
  if (p.sort_size == 256)
    sort_and_rank(std::integral_constant<int, 256>{});
  else if (p.sort_size == 512)
    sort_and_rank(std::integral_constant<int, 512>{});
  else
    sort_and_rank(std::integral_constant<int, 1024>{});
  const unsigned tiles = (p.pool_size + selection::kMergeTile - 1) / selection::kMergeTile;
  for (int level = selection::kRankLevels; (1 << level) < p.num_chunks; ++level) {
    // The most chunks that have this bit set.
    const unsigned merges = (p.num_chunks >> (level + 1) << level) +
                            std::clamp((p.num_chunks & ((2 << level) - 1)) - (1 << level), 0, 1 << level);
    launch_behind(selection::merge_kernel, dim3(merges, tiles, lanes), selection::kMergeThreads, 0, stream, p, level);
  }
  launch_behind(selection::threshold_kernel, each_chunk, selection::kThresholdThreads, 0, stream, p);
  const auto walk_chunks = [&](auto entries) {
    launch_behind(selection::chunk_kernel<decltype(entries)::value>, num_chunk_ctas(p), selection::kChunkThreads,
                  selection::chunk_shared_bytes(decltype(entries)::value), stream, p);
  };
  if (selection::shared_entries(max_shared_bytes()) == selection::kManyEntries)
    walk_chunks(std::integral_constant<int, selection::kManyEntries>{});
  else
    walk_chunks(std::integral_constant<int, selection::kFewEntries>{});
  if (p.live.rows != nullptr)
    launch_behind(selection::list_kernel, dim3(p.num_lists, lanes), selection::kListThreads, 0, stream, p);
  check_cuda(cudaGetLastError(), "select");
}

}  // namespace sparsek::cuda
