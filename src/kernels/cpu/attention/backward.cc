// Section 5 on all threads: runs in parallel, what they add to keys summed up in the order of the runs.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "base/bf16.h"
#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/attention/double_path.h"
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/runs.h"
#include "kernels/cpu/attention/score_gradient.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr PerIsa<decltype(&portable::backward_scratch_bytes)> kScratchBytes{
    &portable::backward_scratch_bytes, &avx2::backward_scratch_bytes, &avx512::backward_scratch_bytes};
constexpr PerIsa<decltype(&portable::backward_run)> kBackwardRun{&portable::backward_run, &avx2::backward_run,
                                                                 &avx512::backward_run};

// The sums over runs: float32 [batch, seqlen_k, num_kv_heads, head_dim], which for float32 are the outputs themselves.
struct KeyGradients {
  float *dk, *dv, *dk_far;  // dk_far is dk where there is no far rotary
  double* row_h;            // [batch, num_kv_heads, seqlen_k]
};

void add(float* to, const float* from, float factor, int32_t size) {
  for (int32_t c = 0; c < size; ++c) to[c] += factor * from[c];
}

// Of one (batch row, KV head).
void add_run(const AttentionFwdParams& f, int32_t batch, int32_t kv_head, const RunGradients& run,
             const KeyGradients& sums) {
  const int64_t row_size = static_cast<int64_t>(f.num_kv_heads) * f.head_dim;
  const int64_t first =
      static_cast<int64_t>(batch) * f.seqlen_k * row_size + static_cast<int64_t>(kv_head) * f.head_dim;
  const int64_t lane = static_cast<int64_t>(batch) * f.num_kv_heads + kv_head;
  for (int32_t row = run.first_band_row; row < run.end_band_row; ++row) {
    const int64_t from = static_cast<int64_t>(row - run.first_panel_row) * run.padded_dim, to = first + row * row_size;
    add(sums.dk + to, run.band_dk + from, static_cast<float>(f.softmax_scale), f.head_dim);
    add(sums.dv + to, run.band_dv + from, 1.0f, f.head_dim);
  }
  for (int32_t n = 0; n < run.num_far; ++n) {
    const int64_t from = static_cast<int64_t>(n) * run.padded_dim, to = first + run.far_row[n] * row_size;
    add(sums.dk_far + to, run.far_dk + from, static_cast<float>(f.softmax_scale), f.head_dim);
    add(sums.dv + to, run.far_dv + from, 1.0f, f.head_dim);
    sums.row_h[lane * f.seqlen_k + run.far_row[n]] += run.far_h[n];
  }
}

// Finished runs wait here until all earlier ones of their (batch row, KV head) are added.
class OrderedSum {
 public:
  OrderedSum(const AttentionFwdParams& params, const KeyGradients& sums, int64_t runs_per_lane)
      : params_(params), sums_(sums), lanes_(static_cast<size_t>(params.batch) * params.num_kv_heads) {
    for (Lane& lane : lanes_) lane.waiting.resize(runs_per_lane);
  }

  struct Run {
    ScratchMemory memory;
    std::unique_ptr<RunGradients> gradients;
  };

  std::unique_ptr<Run> new_run(const RunPlan& plan, int32_t padded_dim) {
    std::unique_ptr<Run> run;
    {
      const std::lock_guard lock(spare_mutex_);
      if (!spare_.empty()) {
        run = std::move(spare_.back());
        spare_.pop_back();
      }
    }
    if (!run) run = std::make_unique<Run>();
    Arena counter(nullptr);
    RunGradients(&counter, plan, padded_dim);
    Arena arena(run->memory.at_least(counter.used_bytes()));
    run->gradients = std::make_unique<RunGradients>(&arena, plan, padded_dim);
    return run;
  }

  void finish(const RunPlan& plan, int64_t run_index, std::unique_ptr<Run> run) {
    Lane& lane = lanes_[static_cast<size_t>(plan.batch) * params_.num_kv_heads + plan.kv_head];
    const std::lock_guard lock(lane.mutex);
    lane.waiting[run_index] = std::move(run);
    for (; lane.next < lane.waiting.size() && lane.waiting[lane.next]; ++lane.next) {
      std::unique_ptr<Run> done = std::move(lane.waiting[lane.next]);
      add_run(params_, plan.batch, plan.kv_head, *done->gradients, sums_);
      const std::lock_guard spare_lock(spare_mutex_);
      spare_.push_back(std::move(done));
    }
  }

 private:
  struct Lane {
    std::mutex mutex;
    size_t next = 0;
    std::vector<std::unique_ptr<Run>> waiting;
  };
  const AttentionFwdParams& params_;
  KeyGradients sums_;
  std::vector<Lane> lanes_;
  std::mutex spare_mutex_;
  std::vector<std::unique_ptr<Run>> spare_;
};

void zero(float* values, int64_t count) {
  constexpr int64_t kPiece = 1 << 16;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < count; n += kPiece) {
    std::memset(values + n, 0, static_cast<size_t>(std::min(kPiece, count - n)) * sizeof(float));
  }
}

void round_to(void* to, const float* from, int64_t count) {
  auto* out = static_cast<BFloat16*>(to);
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < count; ++n) out[n] = to_bf16(from[n]);
}

}  // namespace

void attention_backward(const AttentionBwdParams& params) {
  const AttentionFwdParams& f = params.fwd;
  if (f.batch == 0) return;
  if (f.dtype == DType::kF64) return backward_double(params);
  const int64_t lanes = static_cast<int64_t>(f.batch) * f.num_kv_heads;
  const int64_t key_size = lanes * f.seqlen_k * f.head_dim;
  const bool is_bf16 = f.dtype == DType::kBF16;
  const int num_sums = is_bf16 ? (f.k_far ? 3 : 2) : 0;
  const std::unique_ptr<float[]> rounded_later(new float[num_sums * key_size]);
  std::vector<double> row_h(lanes * f.seqlen_k, 0.0), h_sums(lanes * f.seqlen_q, 0.0);
  KeyGradients sums{};
  sums.dk = is_bf16 ? rounded_later.get() : static_cast<float*>(params.dk);
  sums.dv = is_bf16 ? rounded_later.get() + key_size : static_cast<float*>(params.dv);
  sums.dk_far = !f.k_far ? sums.dk : is_bf16 ? rounded_later.get() + 2 * key_size : static_cast<float*>(params.dk_far);
  sums.row_h = row_h.data();
  zero(sums.dk, key_size);
  zero(sums.dv, key_size);
  if (f.k_far) zero(sums.dk_far, key_size);

  const auto scratch_bytes = kScratchBytes.active();
  const auto backward_run = kBackwardRun.active();
  const int32_t tile = tile_queries(f.num_heads / f.num_kv_heads);
  // Longer runs than the forward's: each hands over a window and a selection of key gradients.
  constexpr int64_t kRuns = 96;
  const int32_t run_length = run_queries(lanes, f.seqlen_q, tile, kRuns);
  const int64_t runs_per_lane = (f.seqlen_q + run_length - 1) / run_length;
  OrderedSum ordered(f, sums, runs_per_lane);
  for_each_run(f, tile, run_length, [&](const RunPlan& plan, ScratchMemory* scratch, int64_t index) {
    std::unique_ptr<OrderedSum::Run> run = ordered.new_run(plan, (f.head_dim + 15) / 16 * 16);
    const int64_t lane = static_cast<int64_t>(plan.batch) * f.num_kv_heads + plan.kv_head;
    backward_run(params, plan, scratch->at_least(scratch_bytes(params, plan)), *run->gradients,
                 h_sums.data() + lane * f.seqlen_q);
    ordered.finish(plan, index % runs_per_lane, std::move(run));
  });

  if (is_bf16) {
    round_to(params.dk, sums.dk, key_size);
    round_to(params.dv, sums.dv, key_size);
    if (f.k_far) round_to(params.dk_far, sums.dk_far, key_size);
  }
  const int64_t num_score_rows = static_cast<int64_t>(params.num_pool_rows) + f.seqlen_k;
  parallel_for(lanes, [&](int64_t lane) {
    score_gradient(params.num_pool_rows, f.seqlen_k, f.seqlen_q, params.frac_begin + lane * num_score_rows,
                   params.frac_end + lane * num_score_rows, h_sums.data() + lane * f.seqlen_q,
                   row_h.data() + lane * f.seqlen_k, static_cast<float*>(params.dscores) + lane * num_score_rows);
  });
}

}  // namespace sparsek::cpu
