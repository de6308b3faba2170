#include "kernels/cuda/select/select_chunk.h"

#include <algorithm>
#include <cassert>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/select/carried_outputs.cuh"
#include "kernels/cuda/select/carried_pools.cuh"
#include "kernels/cuda/select/carried_queries.cuh"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

selection::CarriedProblem describe(const SelectChunkParams& params) {
  selection::CarriedProblem p{};
  p.params = params;
  p.lanes = params.batch * params.num_kv_heads;
  p.stretches = (params.chunk + selection::kStretch - 1) / selection::kStretch;
  p.pieces = (params.chunk + selection::kPiece - 1) / selection::kPiece;
  p.limit = params.pool_size > 0 ? params.pool_size : params.pool_capacity + params.chunk;
  return p;
}

int64_t num_query_ctas(const selection::CarriedProblem& p) {
  return std::min<int64_t>(int64_t{p.lanes} * p.pieces, 2 * num_multiprocessors());
}

int64_t carve(selection::CarriedProblem& p, void* workspace) {
  Carver carver(workspace);
  const int64_t stretches = int64_t{p.lanes} * p.stretches, pools = stretches + p.lanes,
                queries = int64_t{p.lanes} * p.params.chunk, slots = int64_t{p.lanes} * p.params.topk;
  carver.take(p.sorted, stretches * selection::kStretch);
  carver.take(p.first_bad, stretches);
  carver.take(p.pools, pools * p.limit);
  carver.take(p.pool_counts, pools);
  carver.take(p.slot_of_rank, slots), carver.take(p.rank_of_slot, slots);
  carver.take(p.kth, queries), carver.take(p.edge, queries), carver.take(p.tau, queries);
  carver.take(p.num_support, p.lanes);
  if (p.limit > selection::kListCache) {
    carver.take(p.lists, num_query_ctas(p) * (int64_t{p.limit} + p.limit / 8 + 1));
  }
  return carver.used_bytes();
}

}  // namespace

int64_t select_chunk_workspace_bytes(const SelectChunkParams& params) {
  selection::CarriedProblem p = describe(params);
  return carve(p, nullptr);
}

void select_chunk(const SelectChunkParams& params, void* workspace, cudaStream_t stream) {
  assert(params.dtype == DType::kF32);
  assert(params.topk >= 1 && params.window_size >= 1 && params.num_sinks >= 0 && params.chunk >= 1);
  selection::CarriedProblem p = describe(params);
  carve(p, workspace);
  const unsigned lanes = p.lanes;
  selection::carried_begin_kernel<<<lanes*(p.stretches + 1), selection::kCarriedThreads, 0, stream>>>(p);
  selection::carried_merge_kernel<<<lanes, selection::kStretch, 0, stream>>>(p);
  selection::carried_query_kernel<<<static_cast<unsigned>(num_query_ctas(p)), selection::kQueryThreads, 0, stream>>>(p);
  selection::carried_tau_kernel<<<lanes, selection::kTauThreads, 0, stream>>>(p);
  const int64_t items =
      p.lanes * (2 * int64_t{params.topk} + params.pool_capacity + params.chunk + params.new_pool_capacity);
  const int64_t ctas = std::min<int64_t>((items + selection::kOutputThreads - 1) / selection::kOutputThreads, 1 << 20);
  selection::carried_output_kernel<<<static_cast<unsigned>(ctas), selection::kOutputThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "select_chunk");
}

}  // namespace sparsek::cuda
