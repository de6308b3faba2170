// Attention forward, backward and score gradient, behind selection, against kernels/reference: documents, batches,
// groups, sinks, far rotary, both gates, dlse, carried rows; by every set of kernels, dtype and head_dim. Each row is
// to be as exact as the same computed plainly in the same precision.
#include "kernels/cuda/attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/cuda/select/select.h"
#include "kernels/reference/reference.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/cuda/plain_attention.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek::test {
namespace {

using reference::Spec;

// What runs a case. kAutomatic: skipped where no other set than the portable one would serve.
struct Variant {
  cuda::KernelChoice choice;
  DType dtype;
  int64_t head_dim;
};

struct Case {
  Variant variant;
  Spec spec;
  ScoreKind scores = ScoreKind::kNormal;
  bool far = false;
  int64_t carried = 0;  // these queries belong to earlier calls
  uint64_t seed = 1;
  int repeats = 2;  // of the backward, with the same bits each time where it is deterministic
};

std::string describe(const Case& c) {
  const Spec& s = c.spec;
  return fmt::format("B {} T {} heads {}/{} k {} w {} s {} m {} documents {} gate {} far {} carried {} scores {}",
                     s.batch, s.seqlen, s.num_heads, s.num_kv_heads, s.topk, s.window_size, s.num_sinks, s.pool_size,
                     s.cu_seqlens.empty() ? 1 : s.cu_seqlens.size() - 1, s.gate == Gate::kSoft ? "soft" : "hard", c.far,
                     c.carried, name(c.scores));
}

// Each row within `slack` times the plain row's error, or, where that row of plain was lucky, the error that nine
// tenths of plain's rows stay below. Rows whose gradient cancels to almost nothing are as exact as what cancelled: they
// count as a quarter of the mean row.
void expect_rows(const char* what, const Values& actual, const Values& plain, const Values& expected, int64_t row_size,
                 double slack) {
  ASSERT_EQ(actual.size(), expected.size());
  ASSERT_EQ(plain.size(), expected.size());
  const int64_t rows = std::ssize(expected) / row_size;
  double total = 0;
  for (const double x : expected) total += x * x;
  const double floor = 0.25 * std::sqrt(total / static_cast<double>(rows)) + 1e-12;
  std::vector<double> relative(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const RowError error = row_error(&plain[row * row_size], &expected[row * row_size], row_size);
    relative[row] = error.difference / (error.norm + floor);
  }
  std::vector<double> sorted = relative;
  std::nth_element(sorted.begin(), sorted.begin() + rows * 9 / 10, sorted.end());
  const double usual = sorted[rows * 9 / 10];
  double worst = 0;
  int64_t worst_row = -1;
  for (int64_t row = 0; row < rows; ++row) {
    const RowError error = row_error(&actual[row * row_size], &expected[row * row_size], row_size);
    const double times = error.difference / (error.norm + floor) / (std::max(relative[row], usual) + 1e-9);
    if (!(times <= worst)) worst = times, worst_row = row;
  }
  EXPECT_TRUE(worst <= slack) << what << ": the error of row " << worst_row << " of " << rows << " is " << worst
                              << " times the plain one's (" << relative[std::max<int64_t>(worst_row, 0)]
                              << ", usually up to " << usual << "), allowed " << slack;
}

void run(const Case& c) {
  SCOPED_TRACE(describe(c));
  const Spec& spec = c.spec;
  const int64_t batch = spec.batch, length = spec.seqlen, heads = spec.num_heads, kv_heads = spec.num_kv_heads,
                lanes = batch * kv_heads;
  const int64_t first = c.carried, queries = length - first, head_dim = spec.head_dim;
  const DType dtype = c.variant.dtype;
  const cuda::KernelChoice choice = c.variant.choice;
  const auto values = [&](int64_t count, uint64_t seed, double std) {
    return from_bits(to_bits(normal(count, c.seed * 100 + seed, std), dtype), dtype);
  };
  const int64_t q_size = batch * length * heads * head_dim, k_size = batch * length * kv_heads * head_dim;
  reference::AttentionInputs inputs{values(q_size, 1, 1.5), values(k_size, 2, 1), values(k_size, 3, 1),
                                    round_to_f32(make_scores(c.scores, batch, length, kv_heads, c.seed))};
  if (c.far) inputs.q_far = values(q_size, 4, 1), inputs.k_far = values(k_size, 5, 1);
  Values dout = values(q_size, 6, 1), dlse = round_to_f32(normal(batch * heads * length, c.seed * 100 + 7));
  for (int64_t b = 0; b < batch; ++b) {  // earlier queries are not ours
    for (int64_t i = 0; i < first; ++i) {
      std::fill_n(dout.begin() + (b * length + i) * heads * head_dim, heads * head_dim, 0.0);
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
  const auto from_first = [&](const Values& all, int64_t outer, int64_t size) {  // of [outer, length, size]
    Values result;
    for (int64_t o = 0; o < outer; ++o)
      result.insert(result.end(), all.begin() + (o * length + first) * size, all.begin() + (o + 1) * length * size);
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
  const int64_t row_size = heads * head_dim;
  PlainAttention plain{dtype, batch, queries, length, first, heads, kv_heads, head_dim, spec.gate, spec.softmax_scale};
  const Values q_later = from_first(inputs.q, batch, row_size), dout_later = from_first(dout, batch, row_size),
               q_far_later = c.far ? from_first(inputs.q_far, batch, row_size) : Values();
  plain.q = to_f32(q_later), plain.k = to_f32(inputs.k), plain.v = to_f32(inputs.v);
  plain.q_far = to_f32(q_far_later), plain.k_far = to_f32(inputs.k_far);
  plain.dout = to_f32(dout_later), plain.dlse = later_dlse;
  plain.scores = row_scores.to_vector(), plain.tau = taus;
  plain.window_begin = window, plain.far_begin = begins, plain.far_end = ends;
  const DeviceArray<uint16_t> q(to_bits(q_later, dtype)), k(to_bits(inputs.k, dtype)), v(to_bits(inputs.v, dtype)),
      d_dout(to_bits(dout_later, dtype)), q_far(to_bits(q_far_later, dtype)), k_far(to_bits(inputs.k_far, dtype));
  const DeviceArray<uint16_t> out(batch * queries * row_size), dq(batch * queries * row_size),
      dq_far(c.far ? batch * queries * row_size : 0);
  const DeviceArray<uint16_t> dk(k_size), dv(k_size), dk_far(c.far ? k_size : 0);
  live = {d_lists.data(), d_counts.data(), d_classes.data(), capacity, max_far};

  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd.dtype = dtype;
  fwd.q = q.data(), fwd.k = k.data(), fwd.v = v.data();
  if (c.far) fwd.q_far = q_far.data(), fwd.k_far = k_far.data();
  fwd.scores = row_scores.data(), fwd.tau = d_tau.data(), fwd.window_begin = d_window.data(),
  fwd.far_begin = d_begins.data(), fwd.far_end = d_ends.data();
  fwd.out = out.data(), fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.q_far_strides = fwd.out_strides = {queries * row_size, row_size, head_dim};
  fwd.k_strides = fwd.v_strides = fwd.k_far_strides = {length * kv_heads * head_dim, kv_heads * head_dim, head_dim};
  fwd.batch = static_cast<int32_t>(batch), fwd.seqlen_q = static_cast<int32_t>(queries),
  fwd.seqlen_k = static_cast<int32_t>(length), fwd.num_carried = static_cast<int32_t>(first);
  fwd.num_heads = static_cast<int32_t>(heads), fwd.num_kv_heads = static_cast<int32_t>(kv_heads),
  fwd.head_dim = static_cast<int32_t>(head_dim);
  fwd.gate = spec.gate, fwd.softmax_scale = spec.softmax_scale;
  if (choice == cuda::KernelChoice::kAutomatic) {
    ASSERT_EQ(cuda::attention_kernel_set(fwd, live), cuda::KernelSet::kSm90);
  }
  cuda::attention_forward(fwd, live, nullptr, choice);
  cuda::check_cuda(cudaDeviceSynchronize(), "attention_forward");
  plain.forward();
  expect_rows("out", from_bits(out.to_vector(), dtype), as_doubles(plain.out),
              from_first(expected.out, batch, row_size), head_dim, 2);
  EXPECT_ELEMENTS_CLOSE(lse.to_vector(), from_first(expected.softmax_lse, batch * heads, 1), 2e-5);

  params.dout = d_dout.data(), params.dlse = d_dlse.data(), params.dout_strides = fwd.out_strides;
  params.frac_begin = d_fractions_begin.data(), params.frac_end = d_fractions_end.data();
  params.dq = dq.data(), params.dk = dk.data(), params.dv = dv.data(), params.dscores = dscores.data();
  if (c.far) params.dq_far = dq_far.data(), params.dk_far = dk_far.data();
  params.deterministic = choice == cuda::KernelChoice::kPortable;
  const auto all_bits = [&] {
    std::vector<uint16_t> bits;
    for (const auto* array : {&dq, &dk, &dv, &dq_far, &dk_far}) {
      const std::vector<uint16_t> part = array->to_vector();
      bits.insert(bits.end(), part.begin(), part.end());
    }
    return bits;
  };
  std::vector<uint16_t> first_bits;
  std::vector<float> first_dscores;
  for (int n = 0; n < (params.deterministic ? c.repeats : 1); ++n) {
    const DeviceArray<uint8_t> workspace(cuda::attention_backward_workspace_bytes(params, live, choice));
    cuda::attention_backward(params, live, workspace.data(), nullptr, choice);
    cuda::check_cuda(cudaDeviceSynchronize(), "attention_backward");
    if (n == 0) first_bits = all_bits(), first_dscores = dscores.to_vector();
    EXPECT_EQ(all_bits(), first_bits) << "repeat " << n;
    EXPECT_EQ(std::memcmp(dscores.to_vector().data(), first_dscores.data(), first_dscores.size() * sizeof(float)), 0);
  }
  plain.out = to_f32(from_bits(out.to_vector(), dtype));
  plain.backward(lse.to_vector());
  const auto expect = [&](const char* what, const DeviceArray<uint16_t>& actual, const Values& plainly,
                          const Values& wanted) {
    expect_rows(what, from_bits(actual.to_vector(), dtype), plainly, wanted, head_dim, 2);
  };
  expect("dq", dq, plain.dq, from_first(gradients.dq, batch, row_size));
  expect("dk", dk, plain.dk, gradients.dk);
  expect("dv", dv, plain.dv, gradients.dv);
  if (c.far) {
    expect("dq_far", dq_far, plain.dq_far, from_first(gradients.dq_far, batch, row_size));
    expect("dk_far", dk_far, plain.dk_far, gradients.dk_far);
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

class CudaAttention : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_DEVICE();
    const Variant& v = GetParam();
    if (v.choice != cuda::KernelChoice::kAutomatic) return;
    AttentionFwdParams params{};
    params.dtype = v.dtype, params.head_dim = static_cast<int32_t>(v.head_dim),
    params.num_heads = params.num_kv_heads = 1;
    if (cuda::attention_kernel_set(params, {}) == cuda::KernelSet::kPortable) GTEST_SKIP() << "no other set serves it";
  }
  // One document of which everything else may be changed.
  static Case base(int64_t seqlen, int64_t heads, int64_t kv_heads, int64_t topk, int64_t window) {
    Case c{GetParam(), {}};
    c.spec.seqlen = seqlen;
    c.spec.num_heads = heads;
    c.spec.num_kv_heads = kv_heads;
    c.spec.head_dim = GetParam().head_dim;
    c.spec.topk = topk;
    c.spec.window_size = window;
    c.spec.pool_size = 4 * topk;
    c.spec.softmax_scale = 1 / std::sqrt(static_cast<double>(GetParam().head_dim));
    return c;
  }
};

TEST_P(CudaAttention, Lengths) {
  for (const int64_t seqlen : {1, 2, 63, 64, 65, 127, 128, 129, 257, 500}) {
    run(base(seqlen, 2, 2, 20, 30));
    if (HasFailure()) return;
  }
}
TEST_P(CudaAttention, WindowAndSelectionLargerThanTheSequence) {
  run(base(200, 2, 1, 500, 17));
  run(base(200, 2, 1, 5, 300));
  run(base(200, 2, 1, 5, 1));
}
TEST_P(CudaAttention, GroupsAndSinks) {
  for (const int64_t group : {1, 2, 3, 4, 5, 8}) {
    Case c = base(1100, group, 1, 70, 100);
    c.spec.num_sinks = group % 3 * 2;
    c.spec.gate = group % 2 ? Gate::kSoft : Gate::kHard;
    run(c);
    if (HasFailure()) return;
  }
}
TEST_P(CudaAttention, LargeGroups) {
  for (const int64_t group : {33, 64}) {
    run(base(150, group, 1, 20, 30));
    if (HasFailure()) return;
  }
}
TEST_P(CudaAttention, Scores) {
  for (const ScoreKind kind : kAllScoreKinds) {
    Case c = base(1100, 2, 1, 60, 90);
    c.scores = kind;
    run(c);
    if (HasFailure()) return;
  }
}
TEST_P(CudaAttention, Documents) {
  Case c = base(1500, 4, 2, 50, 40);
  c.spec.cu_seqlens = {0, 1, 1, 3, 100, 130, 1029, 1500};
  c.spec.num_sinks = 2;
  run(c);
  c.far = true;
  run(c);
}
TEST_P(CudaAttention, Batch) {
  Case c = base(600, 4, 2, 50, 40);
  c.spec.batch = 3;
  run(c);
  c.far = true;
  run(c);
}
TEST_P(CudaAttention, FarRotary) {
  for (const Gate gate : {Gate::kSoft, Gate::kHard}) {
    Case c = base(1100, 6, 2, 80, 60);
    c.spec.gate = gate;
    c.spec.num_sinks = 3;
    c.far = true;
    run(c);
  }
}
TEST_P(CudaAttention, CarriedRows) {
  for (const int64_t carried : {1, 100, 128, 777}) {
    Case c = base(1400, 2, 1, 60, 50);
    c.carried = carried;
    c.spec.num_sinks = 2;
    run(c);
    if (HasFailure()) return;
  }
}
// More far rows in a list than the portable kernels look at in one round, and more chunks than one.
TEST_P(CudaAttention, LongLists) {
  if (GetParam().choice == cuda::KernelChoice::kAutomatic) GTEST_SKIP() << "more far rows than these kernels take";
  Case c = base(2300, 1, 1, 1040, 30);  // rising: a chunk's list has topk and its own 1,024 rows
  c.spec.pool_size = 1100;
  c.scores = ScoreKind::kRising;
  c.far = GetParam().head_dim == 64;
  run(c);
}
// Every query sees all rows behind its window, far more than max_far says, from lists that have room for them: a set of
// kernels attends to all of a tile's rows or makes the tile NaN.
TEST_P(CudaAttention, MoreFarRowsThanPromisedAreSeenOrNan) {
  const Variant& variant = GetParam();
  const int length = 3000, window = 40, head_dim = static_cast<int>(variant.head_dim);
  const int chunk = cuda::attention_chunk(1), num_chunks = (length + chunk - 1) / chunk;
  std::vector<int32_t> begins(length), ends(length, length), window_begin(length);
  for (int i = 0; i < length; ++i)
    begins[i] = std::min(i + window, length), window_begin[i] = std::max(0, i - window + 1);
  std::vector<cuda::LiveRow> lists(num_chunks * length);
  std::vector<int32_t> counts(num_chunks), classes(2 * num_chunks);
  for (int n = 0; n < num_chunks; ++n) {
    for (int row = 0; row < length && begins[row] < std::min((n + 1) * chunk, length); ++row)
      lists[n * length + counts[n]++] = {row, begins[row], std::min((n + 1) * chunk, length), 1.0f};
  }
  const auto halves = [&](uint64_t seed) { return to_bits(normal(length * head_dim, seed), variant.dtype); };
  const DeviceArray<uint16_t> q(halves(1)), k(halves(2)), v(halves(3)), dout(halves(4)), out(length * head_dim),
      dq(length * head_dim), dk(length * head_dim), dv(length * head_dim);
  const DeviceArray<float> scores(std::vector<float>(length, 1.0f)), tau(std::vector<float>(length, 0.0f)), lse(length);
  const DeviceArray<int32_t> d_begins(begins), d_ends(ends), d_window(window_begin), d_counts(counts),
      d_classes(classes);
  const DeviceArray<cuda::LiveRow> d_lists(lists);
  const cuda::LiveLists live{d_lists.data(), d_counts.data(), d_classes.data(), length, 100};
  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd.dtype = variant.dtype, fwd.q = q.data(), fwd.k = k.data(), fwd.v = v.data();
  fwd.scores = scores.data(), fwd.tau = tau.data(), fwd.window_begin = d_window.data();
  fwd.far_begin = d_begins.data(), fwd.far_end = d_ends.data(), fwd.out = out.data(), fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.k_strides = fwd.v_strides = fwd.out_strides = {length * head_dim, head_dim, head_dim};
  fwd.batch = fwd.num_heads = fwd.num_kv_heads = 1, fwd.seqlen_q = fwd.seqlen_k = length, fwd.head_dim = head_dim;
  fwd.softmax_scale = 0.1;
  // By query: is its row of `values` NaN? Tiles are of 128 queries.
  const auto expect_nan = [&](const char* what, const Values& values, int64_t size, int most_rows) {
    for (int i = 0; i < length; ++i) {
      const int last = std::min(i / 128 * 128 + 127, length - 1), seen = std::max(0, last + 1 - window);
      for (int64_t c = 0; c < size; ++c)
        ASSERT_EQ(std::isnan(values[i * size + c]), seen > most_rows) << what << " of query " << i << ", " << seen;
    }
  };
  const auto most_rows = [&](bool forward_only) {
    if (variant.choice == cuda::KernelChoice::kPortable) return INT32_MAX;
    return cuda::attention_max_far(cuda::KernelSet::kSm90, 1, forward_only) + 128;
  };
  cuda::attention_forward(fwd, live, nullptr, variant.choice);
  expect_nan("out", from_bits(out.to_vector(), variant.dtype), head_dim, most_rows(true));
  expect_nan("lse", as_doubles(lse.to_vector()), 1, most_rows(true));

  cuda::attention_forward(fwd, live, nullptr, cuda::KernelChoice::kPortable);  // numbers for the backward
  params.dout = dout.data(), params.dout_strides = fwd.out_strides;
  params.dq = dq.data(), params.dk = dk.data(), params.dv = dv.data();
  const DeviceArray<uint8_t> workspace(cuda::attention_backward_workspace_bytes(params, live, variant.choice));
  cuda::attention_backward(params, live, workspace.data(), nullptr, variant.choice);
  expect_nan("dq", from_bits(dq.to_vector(), variant.dtype), head_dim, most_rows(false));
}
// What live_lists does to queries whose list was cut.
TEST_P(CudaAttention, TauThatIsNanMakesItsRowsAndGradientsNan) {
  const Variant& variant = GetParam();
  const int length = 300, bad = 170, window = 30, head_dim = static_cast<int>(variant.head_dim);
  std::vector<int32_t> begins(length), ends(length, length), window_begin(length);
  std::vector<cuda::LiveRow> lists;
  for (int i = 0; i < length; ++i)
    begins[i] = std::min(i + window, length), window_begin[i] = std::max(0, i - window + 1);
  for (int row = 0; row < length - window; ++row) lists.push_back({row, begins[row], length, 0.5f});
  std::vector<float> taus(length, 0.0f);
  taus[bad] = NAN;
  const auto halves = [&](uint64_t seed) { return to_bits(normal(length * head_dim, seed), variant.dtype); };
  const DeviceArray<uint16_t> q(halves(1)), k(halves(2)), v(halves(3)), out_of_others(halves(4)), dout(halves(5)),
      dq(length * head_dim), dk(length * head_dim), dv(length * head_dim);
  const DeviceArray<float> scores(std::vector<float>(length, 0.5f)), tau(taus), lse(std::vector<float>(length, 3.0f)),
      dscores(length);
  const DeviceArray<int32_t> d_begins(begins), d_ends(ends), d_window(window_begin),
      counts(std::vector<int32_t>{length - window}), classes(std::vector<int32_t>{0, 0});
  const DeviceArray<cuda::LiveRow> d_lists(lists);
  const cuda::LiveLists live{d_lists.data(), counts.data(), classes.data(), length - window, length};
  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd.dtype = variant.dtype, fwd.q = q.data(), fwd.k = k.data(), fwd.v = v.data();
  fwd.scores = scores.data(), fwd.tau = tau.data(), fwd.window_begin = d_window.data();
  fwd.far_begin = d_begins.data(), fwd.far_end = d_ends.data();
  fwd.out = out_of_others.data(), fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.k_strides = fwd.v_strides = fwd.out_strides = {length * head_dim, head_dim, head_dim};
  fwd.batch = fwd.num_heads = fwd.num_kv_heads = 1, fwd.seqlen_q = fwd.seqlen_k = length, fwd.head_dim = head_dim;
  fwd.softmax_scale = 0.1;
  // The gradient first: numbers in out and lse, as of a call that had room.
  params.dout = dout.data(), params.dout_strides = fwd.out_strides;
  params.frac_begin = d_begins.data(), params.frac_end = d_ends.data();
  params.dq = dq.data(), params.dk = dk.data(), params.dv = dv.data(), params.dscores = dscores.data();
  const DeviceArray<uint8_t> workspace(cuda::attention_backward_workspace_bytes(params, live, variant.choice));
  cuda::attention_backward(params, live, workspace.data(), nullptr, variant.choice);
  cuda::attention_forward(fwd, live, nullptr, variant.choice);
  const auto is_nan = [&](const DeviceArray<uint16_t>& tensor, int row) {
    const Values values = from_bits(tensor.to_vector(), variant.dtype);
    return std::all_of(&values[row * head_dim], &values[row * head_dim] + head_dim,
                       [](double x) { return std::isnan(x); });
  };
  const auto has_nan = [&](const DeviceArray<uint16_t>& tensor, int row) {
    const Values values = from_bits(tensor.to_vector(), variant.dtype);
    return std::any_of(&values[row * head_dim], &values[row * head_dim] + head_dim,
                       [](double x) { return std::isnan(x); });
  };
  for (const int row : {0, bad - 1, bad, bad + 1, length - 1}) {
    EXPECT_EQ(is_nan(dq, row), row == bad) << row;
    EXPECT_EQ(has_nan(dq, row), row == bad) << row;
    EXPECT_EQ(is_nan(out_of_others, row), row == bad) << row;
    EXPECT_EQ(has_nan(out_of_others, row), row == bad) << row;
    EXPECT_EQ(std::isnan(lse.to_vector()[row]), row == bad) << row;
    EXPECT_EQ(is_nan(dk, row), row <= bad) << row;  // all rows up to the query itself are seen
    EXPECT_EQ(is_nan(dv, row), row <= bad) << row;
  }
  EXPECT_TRUE(std::isnan(dscores.to_vector()[bad - window]));
}
TEST_P(CudaAttention, Repeats) {
  if (GetParam().choice == cuda::KernelChoice::kAutomatic) GTEST_SKIP() << "not deterministic";
  Case c = base(2500, 4, 2, 100, 60);
  c.repeats = 20;
  run(c);
}

std::string name(const ::testing::TestParamInfo<Variant>& info) {
  return fmt::format("{}_{}_{}", info.param.choice == cuda::KernelChoice::kPortable ? "portable" : "sm90",
                     sparsek::name(info.param.dtype), info.param.head_dim);
}
constexpr auto kSm90 = cuda::KernelChoice::kAutomatic, kPortable = cuda::KernelChoice::kPortable;
INSTANTIATE_TEST_SUITE_P(, CudaAttention,
                         ::testing::Values(Variant{kSm90, DType::kBF16, 128}, Variant{kSm90, DType::kF16, 128},
                                           Variant{kSm90, DType::kBF16, 64}, Variant{kSm90, DType::kF16, 64},
                                           Variant{kPortable, DType::kBF16, 128}, Variant{kPortable, DType::kF16, 128},
                                           Variant{kPortable, DType::kBF16, 64}, Variant{kPortable, DType::kF16, 64}),
                         name);

}  // namespace
}  // namespace sparsek::test
