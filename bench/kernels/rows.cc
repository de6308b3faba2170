// Times what stands around attention on the GPU: window_mass, the lists of far rows, row arrays, score normalisation
// and eq. 2; tests/kernels/cuda checks them. Usage: bench_rows T heads kv_heads topk window [head_dim] [sinks] [far: 0,
// 1] [repeats]
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "base/bf16.h"
#include "device_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/live_lists.h"
#include "kernels/cuda/rows/visibility.h"
#include "kernels/cuda/scores/scores.h"
#include "kernels/cuda/select/select.h"
#include "kernels/cuda/sparsek/sparsek.h"
#include "kernels/cuda/window_mass/window_mass.h"

using namespace sparsek;

namespace {

std::vector<float> normal(int64_t count, int seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& x : values) x = distribution(engine);
  return values;
}

// Blocks of 2^22 repeat.
BFloat16* normal_bf16(int64_t count, int seed) {
  const std::vector<float> block = normal(std::min<int64_t>(count, 1 << 22), seed);
  std::vector<BFloat16> values(count);
  for (int64_t n = 0; n < count; ++n) values[n] = to_bf16(block[n % std::ssize(block)]);
  return device(values);
}

void time_of(const char* name, int repeats, const std::function<void()>& call) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int n = 0; n < repeats + 3; ++n) {
    cudaEventRecord(start);
    call();
    cudaEventRecord(stop);
    cuda::check_cuda(cudaEventSynchronize(stop), name);
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (n >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  fmt::print("  {} {:.4f} [{:.4f}, {:.4f}] ms\n", name, times[times.size() / 2], times.front(), times.back());
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int n, int otherwise) { return argc > n ? std::atoi(argv[n]) : otherwise; };
  const int seqlen = argument(1, 65536), heads = argument(2, 16), kv_heads = argument(3, 16), topk = argument(4, 1024),
            window = argument(5, 1024), head_dim = argument(6, 128), sinks = argument(7, 4), repeats = argument(9, 15);
  const bool far = argument(8, 0) != 0;
  constexpr int kChunk = 1024;
  const int64_t size = int64_t{seqlen} * kv_heads, q_size = int64_t{seqlen} * heads * head_dim,
                k_size = size * head_dim;
  fmt::print("T {} heads {}/{} k {} w {} head_dim {} sinks {}{}\n", seqlen, heads, kv_heads, topk, window, head_dim,
             sinks, far ? " far" : "");
  const std::vector<float> u = normal(size, 5);

  {  // eq. 1b
    WindowRowsParams rows{};
    rows.window_begin = device<int32_t>(seqlen), rows.far_begin = device<int32_t>(seqlen),
    rows.far_end = device<int32_t>(seqlen), rows.num_queries = device<int32_t>(seqlen);
    rows.batch = 1, rows.seqlen = seqlen, rows.num_documents = 1, rows.window_size = window, rows.num_sinks = sinks;
    WindowMassParams mass{};
    mass.dtype = DType::kBF16;
    mass.q = normal_bf16(q_size, 1), mass.k = normal_bf16(k_size, 2);
    if (far) mass.q_far = normal_bf16(q_size, 3), mass.k_far = normal_bf16(k_size, 4);
    mass.window_begin = rows.window_begin, mass.far_begin = rows.far_begin, mass.far_end = rows.far_end;
    mass.mass = device<float>(size);
    mass.q_strides = mass.q_far_strides = {q_size, int64_t{heads} * head_dim, head_dim};
    mass.k_strides = mass.k_far_strides = {k_size, int64_t{kv_heads} * head_dim, head_dim};
    mass.batch = 1, mass.seqlen_q = mass.seqlen_k = seqlen, mass.num_heads = heads, mass.num_kv_heads = kv_heads;
    mass.head_dim = head_dim, mass.window_size = window;
    mass.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
    void* const workspace = device<uint8_t>(cuda::window_mass_workspace_bytes(mass));
    time_of("window_rows", repeats, [&] { cuda::window_rows(rows, nullptr); });
    time_of("window_mass", repeats, [&] { cuda::window_mass(mass, workspace, nullptr); });
    if (cuda::compute_capability() == 90) {
      time_of("window_mass, portable", repeats,
              [&] { cuda::window_mass(mass, workspace, nullptr, cuda::KernelChoice::kPortable); });
    }
  }

  SelectParams select{};
  select.dtype = DType::kF32;
  select.scores = device(u), select.tau = device<float>(size);
  select.expiry = device<int32_t>(size), select.frac_begin = device<int32_t>(size),
  select.frac_end = device<int32_t>(size);
  select.scores_strides = {size, kv_heads, 1}, select.out_strides = {size, 1, seqlen};
  select.batch = 1, select.seqlen = seqlen, select.num_kv_heads = kv_heads, select.topk = topk,
  select.window_size = window, select.num_sinks = sinks, select.pool_size = std::max(4 * topk, 1024);
  const int num_chunks = (seqlen + kChunk - 1) / kChunk;
  cuda::SelectRows rows{device<float>(size), device<int32_t>(size), device<int32_t>(size), device<int32_t>(seqlen), {}};
  rows.live.capacity = std::min(seqlen, topk + sinks + kChunk), rows.live.max_far = topk + sinks;
  rows.live.rows = device<cuda::LiveRow>(int64_t{kv_heads} * num_chunks * rows.live.capacity);
  rows.live.count = device<int32_t>(int64_t{kv_heads} * num_chunks),
  rows.live.classes = device<int32_t>(2 * int64_t{kv_heads} * num_chunks);
  void* const select_workspace = device<uint8_t>(cuda::select_workspace_bytes(select, kChunk));
  cuda::select(select, rows, kChunk, select_workspace, nullptr);

  AttentionFwdParams fwd{};
  fwd.dtype = DType::kBF16;
  fwd.scores = rows.row_scores, fwd.tau = select.tau, fwd.far_begin = rows.far_begin, fwd.far_end = rows.far_end;
  fwd.batch = 1, fwd.seqlen_q = fwd.seqlen_k = seqlen, fwd.num_heads = heads, fwd.num_kv_heads = kv_heads;
  void* const lists_workspace = device<uint8_t>(cuda::live_lists_workspace_bytes(fwd, kChunk));
  float* const checked_tau = device<float>(size);
  time_of("live_lists", repeats,
          [&] { cuda::live_lists(fwd, kChunk, rows.live, checked_tau, lists_workspace, nullptr); });

  VisibilityParams visible{};
  visible.dtype = DType::kF32;
  visible.scores = select.scores, visible.tau = select.tau, visible.expiry = select.expiry,
  visible.frac_begin = select.frac_begin, visible.frac_end = select.frac_end;
  visible.scores_strides = select.scores_strides, visible.tau_strides = visible.index_strides = select.out_strides;
  visible.row_scores = rows.row_scores, visible.row_tau = device<float>(size), visible.window_begin = rows.window_begin,
  visible.far_begin = rows.far_begin, visible.far_end = rows.far_end, visible.row_frac_begin = device<int32_t>(size),
  visible.row_frac_end = device<int32_t>(size);
  visible.batch = 1, visible.seqlen = seqlen, visible.num_kv_heads = kv_heads, visible.num_documents = 1,
  visible.window_size = window, visible.num_sinks = sinks;
  time_of("visibility", repeats, [&] { cuda::visibility(visible, nullptr); });

  NormaliseBwdParams normalise{};
  normalise.fwd.dtype = DType::kF32;
  normalise.fwd.raw = select.scores, normalise.fwd.scores = device<float>(size);
  normalise.fwd.beta = device(normal(kv_heads, 6)), normalise.fwd.gamma = device(normal(kv_heads, 7)),
  normalise.fwd.slope = device(normal(kv_heads, 8)), normalise.fwd.stats = device<double>(3 * kv_heads);
  normalise.fwd.raw_strides = normalise.fwd.scores_strides = normalise.dscores_strides = select.scores_strides;
  normalise.fwd.batch = 1, normalise.fwd.seqlen = seqlen, normalise.fwd.num_kv_heads = kv_heads;
  normalise.fwd.timestep_norm = true;
  normalise.dscores = device(normal(size, 9)), normalise.draw = device<float>(size);
  normalise.dbeta = device<float>(kv_heads), normalise.dgamma = device<float>(kv_heads),
  normalise.dslope = device<float>(kv_heads);
  void* const normalise_workspace =
      device<uint8_t>(std::max(cuda::normalise_scores_workspace_bytes(normalise.fwd),
                               cuda::normalise_scores_backward_workspace_bytes(normalise)));
  time_of("normalise_scores", repeats, [&] { cuda::normalise_scores(normalise.fwd, normalise_workspace, nullptr); });
  time_of("normalise_scores_backward", repeats,
          [&] { cuda::normalise_scores_backward(normalise, normalise_workspace, nullptr); });

  const SparsekParams matrix{DType::kF32, select.scores, device<float>(size), device<float>(kv_heads), kv_heads,
                             seqlen,      topk};
  time_of("sparsek", repeats, [&] { cuda::sparsek(matrix, nullptr); });
}
