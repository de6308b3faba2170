// Times the GPU's selection with its lists of far rows; tests/kernels/cuda/select_test.cc checks it.
// Usage: bench_select T heads topk window [scores: 0 normal, 1 rising, 2 equal, 3 normal of deviation 0.05] [pool_size]
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/select/select.h"

using namespace sparsek;

namespace {

template <class T>
T* device(int64_t count) {
  void* memory = nullptr;
  cuda::check_cuda(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int n, int otherwise) { return argc > n ? std::atoi(argv[n]) : otherwise; };
  const int seqlen = argument(1, 65536), heads = argument(2, 16), topk = argument(3, 1024), window = argument(4, 1024),
            kind = argument(5, 0), chunk = 1024;
  const int64_t size = int64_t{seqlen} * heads, num_chunks = (seqlen + chunk - 1) / chunk;
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  std::vector<float> scores(size);
  for (int64_t i = 0; i < size; ++i)
    scores[i] = kind == 0   ? normal(engine)
                : kind == 1 ? 0.001f * (i / heads)
                : kind == 2 ? 0.5f
                            : 0.05f * normal(engine);

  SelectParams params{};
  params.dtype = DType::kF32;
  float* in = device<float>(size);
  cuda::check_cuda(cudaMemcpy(in, scores.data(), size * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  params.scores = in;
  params.tau = device<float>(size);
  params.expiry = device<int32_t>(size);
  params.frac_begin = device<int32_t>(size);
  params.frac_end = device<int32_t>(size);
  params.scores_strides = {size, heads, 1};
  params.out_strides = {size, 1, seqlen};
  params.batch = 1;
  params.seqlen = seqlen;
  params.num_kv_heads = heads;
  params.topk = topk;
  params.window_size = window;
  params.pool_size = argument(6, std::max(4 * topk, 1024));
  cuda::SelectRows rows{device<float>(size), device<int32_t>(size), device<int32_t>(size), device<int32_t>(seqlen), {}};
  rows.live.capacity = std::min(seqlen, topk + chunk);
  rows.live.rows = device<cuda::LiveRow>(heads * num_chunks * rows.live.capacity);
  rows.live.count = device<int32_t>(heads * num_chunks);
  rows.live.classes = device<int32_t>(heads * num_chunks * 2);
  const int64_t bytes = cuda::select_workspace_bytes(params, chunk);
  void* workspace = device<uint8_t>(bytes);

  std::vector<float> times;
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  for (int repeat = 0; repeat < 25; ++repeat) {
    cudaEventRecord(start);
    cuda::select(params, rows, chunk, workspace, nullptr);
    cudaEventRecord(stop);
    cuda::check_cuda(cudaEventSynchronize(stop), "select");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (repeat >= 4) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  fmt::print("select T {} heads {} k {} w {} scores {} pool {}: {:.4f} ms (min {:.4f} max {:.4f}), workspace {} MiB\n",
             seqlen, heads, topk, window, kind, params.pool_size, times[times.size() / 2], times.front(), times.back(),
             bytes >> 20);
}
