// Times select_chunk on the GPU behind a long sequence; tests/kernels/cuda checks it. Usage: bench_select_chunk chunk
// batch kv_heads topk [rising: 0, 1] [position] [repeats]
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "device_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select/select_chunk.h"

using namespace sparsek;

int main(int argc, char** argv) {
  const auto argument = [&](int n, int64_t otherwise) -> int64_t { return argc > n ? std::atoll(argv[n]) : otherwise; };
  const int64_t chunk = argument(1, 2048), batch = argument(2, 1), heads = argument(3, 8), topk = argument(4, 1024),
                window = topk, position = argument(6, 100'000), repeats = argument(7, 30), lanes = batch * heads,
                pool = std::max<int64_t>(4 * topk, 1024), candidates = position - window;
  const bool rising = argument(5, 0) != 0;
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  std::vector<float> all(std::max(candidates, pool));  // a head's pool: the best of its candidates
  for (float& u : all) u = normal(engine);
  std::partial_sort(all.begin(), all.begin() + pool, all.end(), std::greater<>());
  all.resize(pool);
  std::vector<float> slots(all.begin(), all.begin() + topk), scores(chunk * heads);
  std::shuffle(slots.begin(), slots.end(), engine);
  std::vector<int64_t> positions(topk);
  std::iota(positions.begin(), positions.end(), 0);
  for (int64_t n = 0; n < chunk * heads; ++n) {
    scores[n] = rising ? 6 + 0.001f * static_cast<float>(n / heads) : normal(engine);
  }

  SelectChunkParams p{};
  p.dtype = DType::kF32;
  p.batch = static_cast<int32_t>(batch), p.chunk = static_cast<int32_t>(chunk),
  p.num_kv_heads = static_cast<int32_t>(heads);
  p.topk = static_cast<int32_t>(topk), p.window_size = static_cast<int32_t>(window);
  p.pool_size = p.pool_capacity = p.new_pool_capacity = static_cast<int32_t>(pool);
  p.scores_strides = p.tau_strides = {chunk * heads, heads, 1};
  p.candidate_scores = device(scores, lanes * chunk), p.slot_scores = device(slots, lanes * topk);
  p.slot_positions = device(positions, lanes * topk), p.pool_scores = device(all, lanes * pool);
  p.lengths = device(std::vector<int64_t>(1, std::max(position, pool + window)), batch);
  p.tau = device<float>(lanes * chunk);
  for (int32_t** out : {&p.slot_expiry, &p.slot_frac_begin, &p.slot_frac_end, &p.new_slot_source}) {
    *out = device<int32_t>(lanes * topk);
  }
  for (int32_t** out : {&p.pool_frac_begin, &p.pool_frac_end, &p.new_pool_source}) *out = device<int32_t>(lanes * pool);
  for (int32_t** out : {&p.arrival_expiry, &p.arrival_frac_begin, &p.arrival_frac_end}) {
    *out = device<int32_t>(lanes * chunk);
  }
  p.new_slot_positions = device<int64_t>(lanes * topk);
  void* const workspace = device<uint8_t>(cuda::select_chunk_workspace_bytes(p));

  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int64_t n = 0; n < repeats + 3; ++n) {
    cudaEventRecord(start);
    cuda::select_chunk(p, workspace, nullptr);
    cudaEventRecord(stop);
    cuda::check_cuda(cudaEventSynchronize(stop), "select_chunk");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (n >= 3) times.push_back(1000 * ms);
  }
  std::sort(times.begin(), times.end());
  fmt::print("chunk {} batch {} heads {} k {} m {}{}: {:.1f} [{:.1f}, {:.1f}] us\n", chunk, batch, heads, topk, pool,
             rising ? " rising" : "", times[times.size() / 2], times.front(), times.back());
}
