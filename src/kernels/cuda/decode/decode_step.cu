#include "kernels/cuda/decode/decode_step.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

#include "kernels/cuda/decode/launches.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

constexpr int ceil_div(int x, int y) {
  return (x + y - 1) / y;
}

int heads_per_cta(int group) {
  return group <= decode::kHeadTile ? decode::kHeadTile : 2 * decode::kHeadTile;
}

decode::Problem describe(const DecodeStepParams& params) {
  decode::Problem p{};
  p.params = params;
  p.group = params.num_heads / params.num_kv_heads;
  p.head_parts = ceil_div(p.group, heads_per_cta(p.group));
  p.sink_tiles = ceil_div(params.num_sinks, decode::kTileRows);
  p.first_slot_tile = p.sink_tiles + ceil_div(params.window_size, decode::kTileRows);
  p.num_tiles = p.first_slot_tile + ceil_div(params.topk, decode::kTileRows);
  p.older_age = ceil_div(params.window_size, 2);
  const DecodeSplits splits =
      decode_splits(int64_t{p.units()} * p.head_parts, p.num_tiles,
                    num_multiprocessors() * (heads_per_cta(p.group) == decode::kHeadTile ? 2 : 1));
  p.num_splits = splits.count;
  p.tiles_per_split = splits.tiles;
  p.scale_log2 = static_cast<float>(params.softmax_scale * 1.4426950408889634);
  return p;
}

int64_t carve(decode::Problem& p, void* workspace) {
  Carver carver(workspace);
  const int64_t rows = int64_t{p.units()} * p.num_splits * p.group;
  carver.take(p.plans, p.units());
  carver.take(p.stats, rows);
  carver.take(p.values, rows * p.params.head_dim);
  if (p.params.ring_mass) carver.take(p.logits, int64_t{p.units()} * p.group * p.params.window_size);
  return carver.used_bytes();
}

}  // namespace

// A wave's time is what its CTAs read, and a fixed part: making the plan, filling the pipeline.
DecodeSplits decode_splits(int64_t ctas_per_split, int num_tiles, int resident_ctas) {
  constexpr int64_t kFixedSteps = 3;
  DecodeSplits best{1, ceil_div(num_tiles, decode::kWarps) * decode::kWarps};
  int64_t least = INT64_MAX;
  const int steps = ceil_div(num_tiles, decode::kWarps);
  for (int wanted = 1; wanted <= std::min(decode::kMaxSplits, steps); ++wanted) {
    const int each = ceil_div(steps, wanted), count = ceil_div(steps, each);
    const int64_t waves = (ctas_per_split * count + resident_ctas - 1) / resident_ctas;
    const int64_t cost = waves * (each + kFixedSteps);
    if (cost < least) least = cost, best = {count, each * decode::kWarps};
  }
  return best;
}

int64_t decode_step_workspace_bytes(const DecodeStepParams& params) {
  decode::Problem p = describe(params);
  return carve(p, nullptr);
}

void decode_step(const DecodeStepParams& params, void* workspace, cudaStream_t stream) {
  assert(params.pool_size > params.topk && params.topk >= 1 && params.window_size >= 1 && params.num_sinks >= 0);
  assert(params.num_heads % params.num_kv_heads == 0 && params.num_heads / params.num_kv_heads <= decode::kMaxGroup);
  assert((params.q_far != nullptr) == (params.k_far != nullptr) &&
         (params.q_far != nullptr) == (params.ring_k != nullptr));
  assert(params.dtype == DType::kBF16 || params.dtype == DType::kF16);
  decode::Problem p = describe(params);
  carve(p, workspace);
  if (params.head_dim == 64) {
    decode::launch<64>(p, stream);
  } else if (params.head_dim == 128) {
    decode::launch<128>(p, stream);
  } else {
    throw std::invalid_argument("decode_step on CUDA: head_dim must be 64 or 128");
  }
}

}  // namespace sparsek::cuda
