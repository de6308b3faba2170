// Selection, forward, backward and score gradient on Hopper, against kernels/reference: documents, batches, groups,
// sinks, far rotary, both gates, dlse, carried rows.
#include "kernels/cuda/attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels/cuda/select/select.h"
#include "kernels/reference/reference.h"
#include "tests/kernels/cuda/device.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek::test {
namespace {

using reference::Spec;

constexpr int64_t kHeadDim = 128;

struct Case {
  Spec spec;
  ScoreKind scores = ScoreKind::kNormal;
  bool far = false;
  int64_t carried = 0;  // these queries belong to earlier calls
  uint64_t seed = 1;
};

std::string describe(const Case& c) {
  const Spec& s = c.spec;
  return fmt::format("B {} T {} heads {}/{} k {} w {} s {} m {} documents {} gate {} far {} carried {} scores {}",
                     s.batch, s.seqlen, s.num_heads, s.num_kv_heads, s.topk, s.window_size, s.num_sinks, s.pool_size,
                     s.cu_seqlens.empty() ? 1 : s.cu_seqlens.size() - 1, s.gate == Gate::kSoft ? "soft" : "hard", c.far,
                     c.carried, name(c.scores));
}

// |actual - expected| of each row of 128 against `tolerance` of its own size and a quarter of that of the mean row's:
// rows whose gradient cancels to almost nothing are as exact as what cancelled.
void expect_rows(const char* what, const std::vector<BFloat16>& actual, const Values& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  double total = 0;
  for (const double x : expected) total += x * x;
  const int64_t rows = std::ssize(expected) / kHeadDim;
  const double typical = std::sqrt(total / static_cast<double>(rows));
  double worst = 0;
  int64_t worst_row = -1;
  for (int64_t row = 0; row < rows; ++row) {
    double error = 0, size = 0;
    for (int64_t c = 0; c < kHeadDim; ++c) {
      const double wanted = expected[row * kHeadDim + c];
      error += std::pow(to_float(actual[row * kHeadDim + c]) - wanted, 2), size += wanted * wanted;
    }
    const double relative = std::sqrt(error) / (std::sqrt(size) + 0.25 * typical + 1e-12);
    if (!(relative <= worst)) worst = relative, worst_row = row;
  }
  EXPECT_TRUE(worst <= tolerance) << what << ": row " << worst_row << " of " << rows << " is off by " << worst
                                  << ", allowed " << tolerance;
}

void run(const Case& c) {
  SCOPED_TRACE(describe(c));
  const Spec& spec = c.spec;
  const int64_t batch = spec.batch, length = spec.seqlen, heads = spec.num_heads, kv_heads = spec.num_kv_heads,
                lanes = batch * kv_heads;
  const int64_t first = c.carried, queries = length - first;
  const auto bf16 = [&](int64_t count, uint64_t seed, double std) {
    return round_to_bf16(normal(count, c.seed * 100 + seed, std));
  };
  const int64_t q_size = batch * length * heads * kHeadDim, k_size = batch * length * kv_heads * kHeadDim;
  reference::AttentionInputs inputs{bf16(q_size, 1, 1.5), bf16(k_size, 2, 1), bf16(k_size, 3, 1),
                                    round_to_f32(make_scores(c.scores, batch, length, kv_heads, c.seed))};
  if (c.far) inputs.q_far = bf16(q_size, 4, 1), inputs.k_far = bf16(k_size, 5, 1);
  Values dout = bf16(q_size, 6, 1), dlse = round_to_f32(normal(batch * heads * length, c.seed * 100 + 7));
  for (int64_t b = 0; b < batch; ++b) {  // earlier queries are not ours
    for (int64_t i = 0; i < first; ++i) {
      std::fill_n(dout.begin() + (b * length + i) * heads * kHeadDim, heads * kHeadDim, 0.0);
      for (int64_t h = 0; h < heads; ++h) dlse[(b * heads + h) * length + i] = 0;
    }
  }
  const reference::AttentionOutputs expected = reference::attention_forward(inputs, spec);
  const reference::AttentionGradients gradients = reference::attention_backward(inputs, dout, dlse, spec);

  // Selection of the whole sequence, rows head-major.
  const int chunk = cuda::attention_chunk(static_cast<int>(heads / kv_heads));
  const DeviceArray<float> scores(to_f32(inputs.scores)), tau(lanes * length), row_scores(lanes * length);
  const DeviceArray<int32_t> expiry(lanes * length), frac_begin(lanes * length), frac_end(lanes * length),
      far_begin(lanes * length), far_end(lanes * length), window_begin(batch * length);
  const DeviceArray<int32_t> cu_seqlens(std::vector<int32_t>(spec.cu_seqlens.begin(), spec.cu_seqlens.end()));
  const int64_t num_chunks = (length + chunk - 1) / chunk;
  const auto capacity = static_cast<int32_t>(std::min(length, spec.topk + spec.num_sinks + chunk));
  const DeviceArray<cuda::LiveRow> live_rows(lanes * num_chunks * capacity);
  const DeviceArray<int32_t> live_count(lanes * num_chunks), live_classes(2 * lanes * num_chunks);
  SelectParams select{};
  select.dtype = DType::kF32;
  select.scores = scores.data(), select.tau = tau.data(), select.expiry = expiry.data(),
  select.frac_begin = frac_begin.data(), select.frac_end = frac_end.data();
  select.cu_seqlens = spec.cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  select.scores_strides = {length * kv_heads, kv_heads, 1}, select.out_strides = {length * kv_heads, 1, length};
  select.batch = static_cast<int32_t>(batch), select.seqlen = static_cast<int32_t>(length),
  select.num_kv_heads = static_cast<int32_t>(kv_heads);
  select.num_documents = spec.cu_seqlens.empty() ? 0 : static_cast<int32_t>(spec.cu_seqlens.size()) - 1;
  select.topk = static_cast<int32_t>(spec.topk), select.window_size = static_cast<int32_t>(spec.window_size),
  select.num_sinks = static_cast<int32_t>(spec.num_sinks);
  select.pool_size = static_cast<int32_t>(spec.pool_size);
  const auto max_far = static_cast<int32_t>(spec.topk + spec.num_sinks);
  cuda::LiveLists live{live_rows.data(), live_count.data(), live_classes.data(), capacity, max_far};
  {
    const DeviceArray<uint8_t> workspace(cuda::select_workspace_bytes(select, chunk));
    cuda::select(select, {row_scores.data(), far_begin.data(), far_end.data(), window_begin.data(), live}, chunk,
                 workspace.data(), nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "select");
  }

  // The rows as a call sees them that begins at query `first`: times count from there.
  std::vector<int32_t> window = window_begin.to_vector(), begins = far_begin.to_vector(), ends = far_end.to_vector(),
                       fractions_begin = frac_begin.to_vector(), fractions_end = frac_end.to_vector();
  std::vector<float> taus = tau.to_vector();
  std::vector<cuda::LiveRow> lists = live_rows.to_vector();
  std::vector<int32_t> counts = live_count.to_vector(), classes = live_classes.to_vector();
  if (first > 0) {
    std::vector<int32_t> later_window;
    std::vector<float> later_tau;
    for (int64_t b = 0; b < batch; ++b)
      later_window.insert(later_window.end(), window.begin() + b * length + first, window.begin() + (b + 1) * length);
    for (int64_t lane = 0; lane < lanes; ++lane)
      later_tau.insert(later_tau.end(), taus.begin() + lane * length + first, taus.begin() + (lane + 1) * length);
    window = later_window, taus = later_tau;
    for (auto* times : {&begins, &ends, &fractions_begin, &fractions_end}) {
      for (int32_t& time : *times) time = std::max(0, time - static_cast<int32_t>(first));
    }
    const std::vector<float> u = row_scores.to_vector();
    const int64_t later_chunks = (queries + chunk - 1) / chunk;
    lists.assign(lanes * later_chunks * capacity, {});
    counts.assign(lanes * later_chunks, 0), classes.assign(2 * lanes * later_chunks, 0);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t n = 0; n < later_chunks; ++n) {
        for (int64_t row = 0; row < length; ++row) {
          const int32_t begin = begins[lane * length + row], end = ends[lane * length + row];
          if (begin >= end || begin >= (n + 1) * chunk || end <= n * chunk) continue;
          lists[(lane * later_chunks + n) * capacity + counts[lane * later_chunks + n]++] = {
              static_cast<int32_t>(row), begin, end, u[lane * length + row]};
        }
      }
    }
  }
  const auto later = [&](const Values& values, int64_t row_size) {  // of [batch, length, ...]
    std::vector<BFloat16> result;
    for (int64_t b = 0; b < batch; ++b) {
      const auto part = to_bf16_values(
          Values(values.begin() + (b * length + first) * row_size, values.begin() + (b + 1) * length * row_size));
      result.insert(result.end(), part.begin(), part.end());
    }
    return result;
  };
  std::vector<float> later_dlse;
  for (int64_t row = 0; row < batch * heads; ++row) {
    for (int64_t i = first; i < length; ++i) later_dlse.push_back(static_cast<float>(dlse[row * length + i]));
  }
  const DeviceArray<int32_t> d_window(window), d_begins(begins), d_ends(ends), d_fractions_begin(fractions_begin),
      d_fractions_end(fractions_end), d_counts(counts), d_classes(classes);
  const DeviceArray<float> d_tau(taus), d_dlse(later_dlse), lse(batch * heads * queries), dscores(lanes * length);
  const DeviceArray<cuda::LiveRow> d_lists(lists);
  const int64_t row_size = heads * kHeadDim;
  const DeviceArray<BFloat16> q(later(inputs.q, row_size)), k(to_bf16_values(inputs.k)), v(to_bf16_values(inputs.v)),
      d_dout(later(dout, row_size));
  const DeviceArray<BFloat16> q_far(c.far ? later(inputs.q_far, row_size) : std::vector<BFloat16>()),
      k_far(to_bf16_values(inputs.k_far));
  const DeviceArray<BFloat16> out(batch * queries * row_size), dq(batch * queries * row_size),
      dq_far(c.far ? batch * queries * row_size : 0);
  const DeviceArray<BFloat16> dk(k_size), dv(k_size), dk_far(c.far ? k_size : 0);
  live = {d_lists.data(), d_counts.data(), d_classes.data(), capacity, max_far};

  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd.dtype = DType::kBF16;
  fwd.q = q.data(), fwd.k = k.data(), fwd.v = v.data();
  if (c.far) fwd.q_far = q_far.data(), fwd.k_far = k_far.data();
  fwd.scores = row_scores.data(), fwd.tau = d_tau.data(), fwd.window_begin = d_window.data(),
  fwd.far_begin = d_begins.data(), fwd.far_end = d_ends.data();
  fwd.out = out.data(), fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.q_far_strides = fwd.out_strides = {queries * row_size, row_size, kHeadDim};
  fwd.k_strides = fwd.v_strides = fwd.k_far_strides = {length * kv_heads * kHeadDim, kv_heads * kHeadDim, kHeadDim};
  fwd.batch = static_cast<int32_t>(batch), fwd.seqlen_q = static_cast<int32_t>(queries),
  fwd.seqlen_k = static_cast<int32_t>(length), fwd.num_carried = static_cast<int32_t>(first);
  fwd.num_heads = static_cast<int32_t>(heads), fwd.num_kv_heads = static_cast<int32_t>(kv_heads),
  fwd.head_dim = kHeadDim;
  fwd.gate = spec.gate, fwd.softmax_scale = spec.softmax_scale;
  cuda::attention_forward(fwd, live, nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "attention_forward");
  const auto from_first = [&](const Values& values, int64_t outer, int64_t size) {  // of [outer, length, size]
    Values result;
    for (int64_t o = 0; o < outer; ++o)
      result.insert(result.end(), values.begin() + (o * length + first) * size,
                    values.begin() + (o + 1) * length * size);
    return result;
  };
  // Twice bf16's unit in the last place, for P and for the result (bench/kernels: .0027 to .0033).
  expect_rows("out", out.to_vector(), from_first(expected.out, batch, row_size), 0.008);
  EXPECT_ELEMENTS_CLOSE(lse.to_vector(), from_first(expected.softmax_lse, batch * heads, 1), 2e-5);

  params.dout = d_dout.data(), params.dlse = d_dlse.data(), params.dout_strides = fwd.out_strides;
  params.frac_begin = d_fractions_begin.data(), params.frac_end = d_fractions_end.data();
  params.dq = dq.data(), params.dk = dk.data(), params.dv = dv.data(), params.dscores = dscores.data();
  if (c.far) params.dq_far = dq_far.data(), params.dk_far = dk_far.data();
  const DeviceArray<uint8_t> workspace(cuda::attention_backward_workspace_bytes(params, live));
  cuda::attention_backward(params, live, workspace.data(), nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "attention_backward");
  // delta comes from bf16 `out`: rows that see few keys cancel (docs/decisions/hopper-attention.md), to .035 here.
  expect_rows("dq", dq.to_vector(), from_first(gradients.dq, batch, row_size), 0.05);
  expect_rows("dk", dk.to_vector(), gradients.dk, 0.012);
  expect_rows("dv", dv.to_vector(), gradients.dv, 0.01);
  if (c.far) {
    expect_rows("dq_far", dq_far.to_vector(), from_first(gradients.dq_far, batch, row_size), 0.05);
    expect_rows("dk_far", dk_far.to_vector(), gradients.dk_far, 0.012);
  }
  Values by_lane(lanes * length);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t h = 0; h < kv_heads; ++h)
        by_lane[(b * kv_heads + h) * length + i] = gradients.dscores[(b * length + i) * kv_heads + h];
    }
  }
  EXPECT_CLOSE_TO_MAXIMUM(dscores.to_vector(), by_lane, 1e-4);
}

Spec base(int64_t seqlen, int64_t heads, int64_t kv_heads, int64_t topk, int64_t window) {
  Spec spec;
  spec.seqlen = seqlen;
  spec.num_heads = heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = kHeadDim;
  spec.topk = topk;
  spec.window_size = window;
  spec.pool_size = 4 * topk;
  spec.softmax_scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
  return spec;
}

TEST(CudaAttention, Lengths) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t seqlen : {1, 2, 63, 64, 65, 127, 128, 129, 257, 500}) {
    run({base(seqlen, 2, 2, 20, 30)});
    if (HasFailure()) return;
  }
}
TEST(CudaAttention, WindowAndSelectionLargerThanTheSequence) {
  SKIP_WITHOUT_DEVICE();
  run({base(200, 2, 1, 500, 17)});
  run({base(200, 2, 1, 5, 300)});
  run({base(200, 2, 1, 5, 1)});
}
TEST(CudaAttention, GroupsAndSinks) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t group : {1, 2, 3, 4, 5, 8}) {
    Case c{base(1300, group, 1, 70, 100)};
    c.spec.num_sinks = group % 3 * 2;
    c.spec.gate = group % 2 ? Gate::kSoft : Gate::kHard;
    run(c);
    if (HasFailure()) return;
  }
}
TEST(CudaAttention, Scores) {
  SKIP_WITHOUT_DEVICE();
  for (const ScoreKind kind : kAllScoreKinds) {
    Case c{base(1100, 2, 1, 60, 90)};
    c.scores = kind;
    run(c);
    if (HasFailure()) return;
  }
}
TEST(CudaAttention, Documents) {
  SKIP_WITHOUT_DEVICE();
  Case c{base(1500, 4, 2, 50, 40)};
  c.spec.cu_seqlens = {0, 1, 1, 3, 100, 130, 1029, 1500};
  c.spec.num_sinks = 2;
  run(c);
  c.far = true;
  run(c);
}
TEST(CudaAttention, Batch) {
  SKIP_WITHOUT_DEVICE();
  Case c{base(600, 4, 2, 50, 40)};
  c.spec.batch = 3;
  run(c);
  c.far = true;
  run(c);
}
TEST(CudaAttention, FarRotary) {
  SKIP_WITHOUT_DEVICE();
  for (const Gate gate : {Gate::kSoft, Gate::kHard}) {
    Case c{base(1200, 6, 2, 80, 60)};
    c.spec.gate = gate;
    c.spec.num_sinks = 3;
    c.far = true;
    run(c);
  }
}
TEST(CudaAttention, CarriedRows) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t carried : {1, 100, 128, 777}) {
    Case c{base(1400, 2, 1, 60, 50)};
    c.carried = carried;
    c.spec.num_sinks = 2;
    run(c);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace sparsek::test
