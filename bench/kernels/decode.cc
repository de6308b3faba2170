// Times decode_step on the GPU: a CUDA graph of one step of several layers, so that no layer's state is in the cache;
// tests/kernels/cuda checks it. Usage: bench_decode batch heads kv_heads head_dim topk window position [rising: 0, 1]
// [far: 0, 1] [mass: 0, 1] [layers] [repeats]
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "base/bf16.h"
#include "device_memory.h"
#include "kernels/cuda/decode/decode_step.h"
#include "kernels/cuda/launch.h"

using namespace sparsek;

namespace {

std::vector<BFloat16> normal_bf16(int64_t count, int seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<BFloat16> values(count);
  for (BFloat16& x : values) x = to_bf16(normal(engine));
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int n, int64_t otherwise) -> int64_t { return argc > n ? std::atoll(argv[n]) : otherwise; };
  const auto batch = argument(1, 64), heads = argument(2, 32), kv_heads = argument(3, 8), head_dim = argument(4, 128),
             topk = argument(5, 1024), window = argument(6, 1024), position = argument(7, 100'000);
  const bool rising = argument(8, 0) != 0, far = argument(9, 0) != 0, mass = argument(10, 0) != 0;
  const int64_t pool = std::max<int64_t>(4 * topk, 1024), units = batch * kv_heads, rows = window + topk,
                state_size = units * rows * head_dim;
  const int64_t layers = argument(11, std::clamp<int64_t>((int64_t{1} << 30) / (state_size * 4), 4, 32)),
                repeats = argument(12, 30);
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;

  // A head's scores: the best of as many normal ones as there are candidates.
  const int64_t candidates = std::max<int64_t>(0, position - window), pooled = std::min(candidates, pool),
                selected = std::min(candidates, topk);
  std::vector<float> all(candidates);
  for (float& u : all) u = normal(engine);
  std::partial_sort(all.begin(), all.begin() + pooled, all.end(), std::greater<>());
  std::vector<float> pool_scores(pool, -INFINITY), slot_scores(topk, 0);
  std::copy(all.begin(), all.begin() + pooled, pool_scores.begin());
  std::copy(all.begin(), all.begin() + selected, slot_scores.begin());
  std::shuffle(slot_scores.begin(), slot_scores.begin() + selected, engine);
  std::vector<int64_t> slot_positions(topk, -1);
  std::iota(slot_positions.begin(), slot_positions.begin() + selected, 0);
  std::vector<float> ring_scores(units * window);
  for (float& u : ring_scores) u = rising ? 10 + 0.001f * std::abs(normal(engine)) : normal(engine);

  const std::vector<BFloat16> block = normal_bf16(1 << 22, 1);
  std::vector<DecodeStepParams> steps(layers);
  int64_t workspace_bytes = 0;
  for (DecodeStepParams& p : steps) {
    p.dtype = DType::kBF16;
    p.batch = static_cast<int32_t>(batch), p.num_heads = static_cast<int32_t>(heads),
    p.num_kv_heads = static_cast<int32_t>(kv_heads), p.head_dim = static_cast<int32_t>(head_dim),
    p.topk = static_cast<int32_t>(topk), p.window_size = static_cast<int32_t>(window),
    p.pool_size = static_cast<int32_t>(pool);
    p.gate = Gate::kSoft, p.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
    p.q = device(normal_bf16(batch * heads * head_dim, 2), batch * heads * head_dim);
    p.k = device(normal_bf16(units * head_dim, 3), units * head_dim);
    p.v = device(normal_bf16(units * head_dim, 4), units * head_dim);
    if (far) p.q_far = p.q, p.k_far = p.k, p.ring_k = device(block, units * window * head_dim);
    p.q_stride_batch = p.q_far_stride_batch = heads * head_dim;
    p.k_stride_batch = p.k_far_stride_batch = p.v_stride_batch = kv_heads * head_dim;
    p.q_stride_head = p.q_far_stride_head = p.k_stride_head = p.k_far_stride_head = p.v_stride_head = head_dim;
    p.state_k = device(block, state_size), p.state_v = device(block, state_size);
    p.scores = device(std::vector<float>(1, rising ? 20.0f : 0.1f), units);
    p.ring_scores = device(ring_scores, units * window);
    p.slot_scores = device(slot_scores, units * topk), p.pool_scores = device(pool_scores, units * pool);
    p.slot_positions = device(slot_positions, units * topk);
    if (mass) p.ring_mass = device(std::vector<float>(window, 0.5f), units * window);
    p.lengths = device(std::vector<int64_t>(1, position), batch);
    p.out = device<BFloat16>(batch * heads * head_dim), p.softmax_lse = device<float>(batch * heads);
    workspace_bytes = std::max(workspace_bytes, cuda::decode_step_workspace_bytes(p));
  }
  void* const workspace = device<uint8_t>(workspace_bytes);

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t step;
  cuda::check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  cuda::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  for (const DecodeStepParams& p : steps) cuda::decode_step(p, workspace, stream);
  cuda::check_cuda(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cuda::check_cuda(cudaGraphInstantiate(&step, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int64_t n = 0; n < repeats + 3; ++n) {
    cudaEventRecord(start, stream);
    cuda::check_cuda(cudaGraphLaunch(step, stream), "cudaGraphLaunch");
    cudaEventRecord(stop, stream);
    cuda::check_cuda(cudaEventSynchronize(stop), "decode_step");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (n >= 3) times.push_back(1000 * ms / static_cast<float>(layers));
  }
  std::sort(times.begin(), times.end());
  const double bytes = 4.0 * static_cast<double>(units * (std::min(position + 1, window) + selected) * head_dim);
  fmt::print(
      "batch {} heads {}/{} d {} k {} w {} position {}{}{}{}: {:.1f} [{:.1f}, {:.1f}] us a layer, K and V at {:.2f} "
      "TB/s\n",
      batch, heads, kv_heads, head_dim, topk, window, position, rising ? " rising" : "", far ? " far" : "",
      mass ? " mass" : "", times[times.size() / 2], times.front(), times.back(),
      bytes / times[times.size() / 2] * 1e-6);
}
