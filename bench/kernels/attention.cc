// Times selection, attention forward and backward on the GPU through their host functions; tests/kernels/cuda checks
// them. Usage: bench_attention T heads kv_heads topk window [scores: 0 normal, 1 rising] [backward: 0 no, 1 yes] [far:
// 0, 1] [repeats] [set=portable] [dtype=float16] [head_dim=64] [deterministic=1]
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string_view>
#include <vector>

#include "base/bf16.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/select/select.h"

using namespace sparsek;

namespace {

int64_t allocated_bytes = 0;

template <class T>
T* device(int64_t count) {
  void* memory = nullptr;
  cuda::check_cuda(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)), "cudaMalloc");
  allocated_bytes += count * static_cast<int64_t>(sizeof(T));
  return static_cast<T*>(memory);
}

// Normal values; blocks of 2^22 repeat.
uint16_t* normal_values(DType dtype, int64_t count, int seed, float deviation) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<uint16_t> block(std::min<int64_t>(count, 1 << 22));
  for (uint16_t& x : block) {
    const float value = normal(engine);
    if (dtype == DType::kBF16) {
      x = to_bf16(value).bits;
    } else {
      const __half half = __float2half_rn(value);
      std::memcpy(&x, &half, sizeof(x));
    }
  }
  uint16_t* const data = device<uint16_t>(count);
  for (int64_t at = 0; at < count; at += std::ssize(block)) {
    cuda::check_cuda(
        cudaMemcpy(data + at, block.data(), std::min<int64_t>(std::ssize(block), count - at) * sizeof(uint16_t),
                   cudaMemcpyHostToDevice),
        "cudaMemcpy");
  }
  return data;
}

// Median, least and most of some repeats, in ms.
struct Timing {
  float median, least, most;
};
Timing time_of(int repeats, const std::function<void()>& call, const std::function<void()>& before = [] {}) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<float> times;
  for (int n = 0; n < repeats + 3; ++n) {
    before();
    cudaEventRecord(start);
    call();
    cudaEventRecord(stop);
    cuda::check_cuda(cudaEventSynchronize(stop), "bench_attention");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (n >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}
std::string text(const Timing& t) {
  return fmt::format("{:.3f} [{:.3f}, {:.3f}]", t.median, t.least, t.most);
}

}  // namespace

int main(int argc, char** argv) {
  cuda::KernelChoice choice = cuda::KernelChoice::kAutomatic;
  DType dtype = DType::kBF16;
  int head_dim = 128;
  bool deterministic = false;
  std::vector<int> numbers;
  for (int n = 1; n < argc; ++n) {
    const std::string_view word = argv[n], value = word.substr(word.find('=') + 1);
    if (value.size() == word.size())
      numbers.push_back(std::atoi(argv[n]));
    else if (word == "set=portable")
      choice = cuda::KernelChoice::kPortable;
    else if (word == "dtype=float16")
      dtype = DType::kF16;
    else if (word.starts_with("head_dim="))
      head_dim = std::atoi(value.data());
    else if (word == "deterministic=1")
      deterministic = true;
    else
      return fmt::print(stderr, "bench_attention: unknown option {}\n", word), 2;
  }
  const auto argument = [&](size_t n, int otherwise) { return numbers.size() >= n ? numbers[n - 1] : otherwise; };
  const int seqlen = argument(1, 65536), heads = argument(2, 16), kv_heads = argument(3, 16), topk = argument(4, 1024),
            window = argument(5, 1024);
  const bool rising = argument(6, 0) != 0, backward = argument(7, 1) != 0, far = argument(8, 0) != 0;
  const int repeats = argument(9, 15), chunk = cuda::attention_chunk(heads / kv_heads),
            num_chunks = (seqlen + chunk - 1) / chunk;
  const int64_t size = int64_t{seqlen} * kv_heads, q_size = int64_t{seqlen} * heads * head_dim,
                k_size = size * head_dim;
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  std::vector<float> scores(size);
  for (int64_t i = 0; i < size; ++i) scores[i] = rising ? 0.001f * static_cast<float>(i / kv_heads) : normal(engine);

  SelectParams select{};
  select.dtype = DType::kF32;
  float* const in = device<float>(size);
  cuda::check_cuda(cudaMemcpy(in, scores.data(), size * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  float* const tau = device<float>(size);
  select.scores = in, select.tau = tau;
  select.expiry = device<int32_t>(size), select.frac_begin = device<int32_t>(size),
  select.frac_end = device<int32_t>(size);
  select.scores_strides = {size, kv_heads, 1}, select.out_strides = {size, 1, seqlen};
  select.batch = 1, select.seqlen = seqlen, select.num_kv_heads = kv_heads, select.topk = topk,
  select.window_size = window, select.pool_size = std::max(4 * topk, 1024);
  cuda::SelectRows rows{device<float>(size), device<int32_t>(size), device<int32_t>(size), device<int32_t>(seqlen), {}};
  rows.live.capacity = std::min(seqlen, topk + chunk);
  rows.live.max_far = topk;
  rows.live.rows = device<cuda::LiveRow>(int64_t{kv_heads} * num_chunks * rows.live.capacity);
  rows.live.count = device<int32_t>(kv_heads * num_chunks),
  rows.live.classes = device<int32_t>(2 * kv_heads * num_chunks);
  void* const select_workspace = device<uint8_t>(cuda::select_workspace_bytes(select, chunk));

  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd.dtype = dtype;
  fwd.q = normal_values(dtype, q_size, 1, 1.5f), fwd.k = normal_values(dtype, k_size, 2, 1),
  fwd.v = normal_values(dtype, k_size, 3, 1);
  if (far) fwd.q_far = normal_values(dtype, q_size, 4, 1), fwd.k_far = normal_values(dtype, k_size, 5, 1);
  fwd.scores = rows.row_scores, fwd.tau = tau, fwd.window_begin = rows.window_begin, fwd.far_begin = rows.far_begin,
  fwd.far_end = rows.far_end;
  fwd.out = device<uint16_t>(q_size), fwd.softmax_lse = device<float>(int64_t{heads} * seqlen);
  fwd.q_strides = fwd.q_far_strides = fwd.out_strides = {q_size, heads * head_dim, head_dim};
  fwd.k_strides = fwd.v_strides = fwd.k_far_strides = {k_size, kv_heads * head_dim, head_dim};
  fwd.batch = 1, fwd.seqlen_q = fwd.seqlen_k = seqlen, fwd.num_heads = heads, fwd.num_kv_heads = kv_heads,
  fwd.head_dim = head_dim;
  fwd.gate = Gate::kSoft, fwd.softmax_scale = 1 / std::sqrt(static_cast<double>(head_dim));
  const auto run_select = [&] { cuda::select(select, rows, chunk, select_workspace, nullptr); };
  const auto run_forward = [&] { cuda::attention_forward(fwd, rows.live, nullptr, choice); };
  const Timing t_select = time_of(repeats, run_select), t_forward = time_of(repeats, run_forward),
               t_behind = time_of(repeats, run_forward, run_select),
               t_both = time_of(repeats, [&] { run_select(), run_forward(); });
  std::string line = fmt::format(
      "{} {} head_dim {} T {} heads {}/{} k {} w {} {}{}: select {} forward {}, behind select {}, together {}",
      cuda::name(cuda::attention_kernel_set(fwd, rows.live, choice)), name(dtype), head_dim, seqlen, heads, kv_heads,
      topk, window, rising ? "rising" : "normal", far ? " far" : "", text(t_select), text(t_forward), text(t_behind),
      text(t_both));
  if (backward) {
    params.dout = normal_values(dtype, q_size, 6, 1), params.dout_strides = fwd.out_strides;
    params.deterministic = deterministic;
    params.frac_begin = select.frac_begin, params.frac_end = select.frac_end;
    params.dq = device<uint16_t>(q_size), params.dk = device<uint16_t>(k_size), params.dv = device<uint16_t>(k_size),
    params.dscores = device<float>(size);
    if (far) params.dq_far = device<uint16_t>(q_size), params.dk_far = device<uint16_t>(k_size);
    void* const workspace = device<uint8_t>(cuda::attention_backward_workspace_bytes(params, rows.live, choice));
    const auto run_backward = [&] { cuda::attention_backward(params, rows.live, workspace, nullptr, choice); };
    const Timing t_backward = time_of(repeats, run_backward),
                 t_all = time_of(repeats, [&] { run_select(), run_forward(), run_backward(); });
    line += fmt::format(", backward {} by {}, all {}", text(t_backward),
                        cuda::name(cuda::attention_backward_kernel_set(params, rows.live, choice)), text(t_all));
  }
  fmt::print("{} ms; {:.2f} GiB\n", line, static_cast<double>(allocated_bytes) / (1 << 30));
}
