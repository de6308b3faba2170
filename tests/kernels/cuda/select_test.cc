// Selection on the GPU against kernels/reference (small cases) and kernels/cpu (long ones): kept sets, expiries and
// fractional intervals exactly, tau to docs/math.md section 8; the lists of far rows against the intervals.
#include "kernels/cuda/select/select.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <set>

#include "kernels/cpu/select/visibility.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::Spec;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Rows {
  std::vector<float> scores;
  std::vector<int32_t> far_begin, far_end, window_begin;
  std::vector<cuda::LiveRow> live;
  std::vector<int32_t> live_count, live_classes;
  int chunk = 0, num_chunks = 0, capacity = 0;
};

SelectResult<float> run_select_cuda(const std::vector<float>& scores, const Spec& spec, int chunk,
                                    Rows* rows = nullptr) {
  const auto size = static_cast<int64_t>(scores.size());
  const DeviceArray<float> in(scores), tau(size);
  const DeviceArray<int32_t> expiry(size), frac_begin(size), frac_end(size);
  const DeviceArray<int32_t> cu_seqlens(std::vector<int32_t>(spec.cu_seqlens.begin(), spec.cu_seqlens.end()));
  SelectParams params{};
  params.dtype = DType::kF32;
  params.scores = in.data();
  params.cu_seqlens = spec.cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  params.tau = tau.data();
  params.expiry = expiry.data();
  params.frac_begin = frac_begin.data();
  params.frac_end = frac_end.data();
  params.scores_strides = params.out_strides = contiguous(spec.seqlen, spec.num_kv_heads);
  params.batch = static_cast<int32_t>(spec.batch);
  params.seqlen = static_cast<int32_t>(spec.seqlen);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.num_documents = spec.cu_seqlens.empty() ? 0 : static_cast<int32_t>(spec.cu_seqlens.size()) - 1;
  params.topk = static_cast<int32_t>(spec.topk);
  params.window_size = static_cast<int32_t>(spec.window_size);
  params.num_sinks = static_cast<int32_t>(spec.num_sinks);
  params.pool_size = static_cast<int32_t>(spec.pool_size);

  const int num_chunks = static_cast<int>((spec.seqlen + chunk - 1) / chunk);
  const int64_t lists = spec.batch * spec.num_kv_heads * num_chunks;
  const int capacity = static_cast<int>(std::min(spec.seqlen, spec.topk + spec.num_sinks + chunk));
  const DeviceArray<float> row_scores(size);
  const DeviceArray<int32_t> far_begin(size), far_end(size), window_begin(spec.batch * spec.seqlen), count(lists),
      classes(lists * 2);
  const DeviceArray<cuda::LiveRow> live(lists * capacity);
  const DeviceArray<uint8_t> workspace(cuda::select_workspace_bytes(params, chunk));
  cuda::SelectRows wanted;
  if (rows != nullptr) {
    wanted = {row_scores.data(),
              far_begin.data(),
              far_end.data(),
              window_begin.data(),
              {live.data(), count.data(), classes.data(), capacity, static_cast<int32_t>(spec.topk + spec.num_sinks)}};
  }
  cuda::select(params, wanted, chunk, workspace.data(), nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "select");
  if (rows != nullptr) {
    *rows = {row_scores.to_vector(),
             far_begin.to_vector(),
             far_end.to_vector(),
             window_begin.to_vector(),
             live.to_vector(),
             count.to_vector(),
             classes.to_vector(),
             chunk,
             num_chunks,
             capacity};
  }
  return {tau.to_vector(), expiry.to_vector(), frac_begin.to_vector(), frac_end.to_vector()};
}

void expect_intervals_follow_tau(const SelectResult<float>& result, const std::vector<float>& scores,
                                 const Spec& spec) {
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
      const auto at = [&](int64_t i) { return (b * spec.seqlen + i) * spec.num_kv_heads + h; };
      Values u(spec.seqlen);
      for (int64_t i = 0; i < spec.seqlen; ++i) u[i] = scores[at(i)];
      std::vector<int64_t> begin(spec.seqlen, -1), end(spec.seqlen, -1);
      reference::for_each_query(u, spec, [&](const reference::QuerySelection& query) {
        for (int64_t j : query.pool) {
          const float p = std::clamp<float>(scores[at(j)] - result.tau[at(query.query)], 0, 1);
          if (p <= 0 || p >= 1) continue;
          if (begin[j] < 0) begin[j] = query.query;
          end[j] = query.query + 1;
        }
      });
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        if (begin[j] < 0) begin[j] = end[j] = j + spec.window_size;
        ASSERT_EQ(result.frac_begin[at(j)], begin[j]) << "key " << j << " head " << h << " batch " << b;
        ASSERT_EQ(result.frac_end[at(j)], end[j]) << "key " << j << " head " << h << " batch " << b;
      }
    }
  }
}

// Row arrays as kernels/cpu makes them from the same selection; lists with exactly the rows some query of the chunk
// sees, in their classes.
void expect_rows(const Rows& rows, const SelectResult<float>& result, const std::vector<float>& scores,
                 const Spec& spec) {
  const int64_t size = std::ssize(scores), lanes = spec.batch * spec.num_kv_heads;
  std::vector<float> row_scores(size), row_tau(size);
  std::vector<int32_t> far_begin(size), far_end(size), window_begin(spec.batch * spec.seqlen);
  const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
  VisibilityParams params{};
  params.dtype = DType::kF32;
  params.scores = scores.data();
  params.tau = result.tau.data();
  params.expiry = result.expiry.data();
  params.frac_begin = result.frac_begin.data();
  params.frac_end = result.frac_end.data();
  params.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  params.scores_strides = params.tau_strides = params.index_strides = contiguous(spec.seqlen, spec.num_kv_heads);
  params.row_scores = row_scores.data();
  params.row_tau = row_tau.data();
  params.window_begin = window_begin.data();
  params.far_begin = far_begin.data();
  params.far_end = far_end.data();
  params.batch = static_cast<int32_t>(spec.batch);
  params.seqlen = static_cast<int32_t>(spec.seqlen);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.num_documents = cu_seqlens.empty() ? 0 : static_cast<int32_t>(cu_seqlens.size()) - 1;
  params.window_size = static_cast<int32_t>(spec.window_size);
  params.num_sinks = static_cast<int32_t>(spec.num_sinks);
  cpu::visibility(params);
  EXPECT_ALL_EQUAL(rows.scores, row_scores);
  EXPECT_ALL_EQUAL(rows.far_begin, far_begin);
  EXPECT_ALL_EQUAL(rows.far_end, far_end);
  EXPECT_ALL_EQUAL(rows.window_begin, window_begin);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int c = 0; c < rows.num_chunks; ++c) {
      const int64_t first = c * rows.chunk, end = std::min<int64_t>(first + rows.chunk, spec.seqlen),
                    list = lane * rows.num_chunks + c;
      std::set<int> wanted;
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        const int64_t row = lane * spec.seqlen + j;
        if (far_end[row] > far_begin[row] && far_begin[row] < end && far_end[row] > first)
          wanted.insert(static_cast<int>(j));
      }
      const auto* list_classes = &rows.live_classes[list * 2];
      ASSERT_EQ(rows.live_count[list], std::ssize(wanted)) << "lane " << lane << " chunk " << c;
      ASSERT_LE(rows.live_count[list], rows.capacity);
      for (int n = 0; n < rows.live_count[list]; ++n) {
        const cuda::LiveRow& row = rows.live[list * rows.capacity + n];
        ASSERT_EQ(wanted.erase(row.row), 1u) << "lane " << lane << " chunk " << c << " row " << row.row;
        const int64_t at = lane * spec.seqlen + row.row;
        ASSERT_EQ(row.begin, far_begin[at]);
        ASSERT_EQ(std::min<int64_t>(row.end, end), std::min<int64_t>(far_end[at], end))
            << "lane " << lane << " chunk " << c << " row " << row.row;
        ASSERT_EQ(row.u, row_scores[at]);
        const bool full = row.begin <= first && far_end[at] >= end;
        const float tau_first = row_tau[lane * spec.seqlen + first], tau_last = row_tau[lane * spec.seqlen + end - 1];
        const int kind = !full ? 2 : row.u - tau_last >= 1 ? 0 : row.u - tau_first < 1 && row.u - tau_last > 0 ? 1 : 2;
        ASSERT_EQ(kind, n < list_classes[0]   ? 0
                        : n < list_classes[1] ? 1
                                              : 2)
            << "lane " << lane << " chunk " << c << " place " << n;
      }
    }
  }
}

void expect_equals_reference(const Values& values, Spec spec, int chunk) {
  spec.precision = reference::Precision::kFloat32;
  const std::vector<float> scores(values.begin(), values.end());
  Rows rows;
  const SelectResult<float> actual = run_select_cuda(scores, spec, chunk, &rows);
  const reference::Selection expected = reference::select(values, spec);
  EXPECT_ALL_EQUAL(actual.expiry, expected.expiry);
  EXPECT_ELEMENTS_CLOSE(actual.tau, expected.tau, 1e-6);
  expect_intervals_follow_tau(actual, scores, spec);
  expect_rows(rows, actual, scores, spec);
}

std::string describe(const Spec& spec, ScoreKind kind, uint64_t seed, int chunk) {
  std::string documents;
  for (int64_t begin : spec.cu_seqlens) documents += fmt::format("{} ", begin);
  return fmt::format("scores {} seed {} B {} T {} H {} k {} w {} s {} m {} chunk {} documents [{}]", name(kind), seed,
                     spec.batch, spec.seqlen, spec.num_kv_heads, spec.topk, spec.window_size, spec.num_sinks,
                     spec.pool_size, chunk, documents);
}

TEST(CudaSelect, EqualsReferenceOnSmallCases) {
  SKIP_WITHOUT_DEVICE();
  std::mt19937_64 engine(1);
  for (uint64_t seed = 0; seed < 2400; ++seed) {
    const ScoreKind kind = kAllScoreKinds[seed % std::size(kAllScoreKinds)];
    const Spec spec = random_spec(engine, 90, 0, 23);
    const int chunk = std::vector<int>{1, 3, 8, 32, 33, 100}[engine() % 6];
    SCOPED_TRACE(describe(spec, kind, seed, chunk));
    expect_equals_reference(make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed), spec, chunk);
    if (HasFailure()) return;
  }
}

TEST(CudaSelect, EqualsReferenceAcrossChunks) {
  SKIP_WITHOUT_DEVICE();
  uint64_t seed = 100;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const int64_t pool_size : {0, 33, 300}) {
      for (const int chunk : {64, 1008, 1023, 1024}) {  // of 1,023 queries the kernels make no shorter ones
        Spec spec;
        spec.seqlen = 2500 + static_cast<int64_t>(seed % 7) * 111;
        spec.topk = pool_size == 300 ? 64 : 21;
        spec.window_size = 17;
        spec.num_sinks = static_cast<int64_t>(seed % 3);
        spec.pool_size = pool_size;
        if (seed % 4 == 0) spec.cu_seqlens = {0, 1, 1, 700, 703, 720, 2300, spec.seqlen};
        SCOPED_TRACE(describe(spec, kind, seed, chunk));
        expect_equals_reference(make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed), spec, chunk);
        ++seed;
        if (HasFailure()) return;
      }
    }
  }
}

// Long sequences against the CPU's selection, which tests/kernels/select checks. Intervals may differ where tau does.
void expect_equals_cpu(const std::vector<float>& scores, const Spec& spec, int chunk) {
  Rows rows;
  const SelectResult<float> actual = run_select_cuda(scores, spec, chunk, &rows), expected = run_select(scores, spec);
  EXPECT_ALL_EQUAL(actual.expiry, expected.expiry);
  EXPECT_ELEMENTS_CLOSE(actual.tau, expected.tau, 1e-6);
  int64_t other_tau = 0, other_interval = 0;
  for (size_t i = 0; i < scores.size(); ++i) other_tau += !(actual.tau[i] == expected.tau[i]);
  const int64_t heads = spec.num_kv_heads;
  for (int64_t at = 0; at < std::ssize(scores); ++at) {
    if (actual.frac_begin[at] == expected.frac_begin[at] && actual.frac_end[at] == expected.frac_end[at]) continue;
    ++other_interval;
    bool excused = false;
    const int64_t lane = at / (spec.seqlen * heads) * spec.seqlen * heads + at % heads;
    for (const int32_t i :
         {actual.frac_begin[at], actual.frac_end[at], expected.frac_begin[at], expected.frac_end[at]}) {
      for (int64_t query : {i - 1, i}) {
        if (query >= 0 && query < spec.seqlen)
          excused |= actual.tau[lane + query * heads] != expected.tau[lane + query * heads];
      }
    }
    ASSERT_TRUE(excused) << "key " << at / heads % spec.seqlen << " head " << at % heads << ": ["
                         << actual.frac_begin[at] << ", " << actual.frac_end[at] << ") wanted ["
                         << expected.frac_begin[at] << ", " << expected.frac_end[at] << ")";
  }
  fmt::print("  tau differs in its last bit at {} of {}, intervals at {}\n", other_tau, scores.size(), other_interval);
  if (spec.seqlen <= 20000) expect_rows(rows, actual, scores, spec);
}

TEST(CudaSelect, EqualsCpuOnLongSequences) {
  SKIP_WITHOUT_DEVICE();
  uint64_t seed = 1;
  for (const ScoreKind kind : kAllScoreKinds) {
    Spec spec;
    spec.seqlen = 16384 + static_cast<int64_t>(seed % 5) * 777;
    spec.num_kv_heads = 3;
    spec.topk = seed % 3 == 0 ? 333 : 1024;
    spec.window_size = seed % 3 == 1 ? 100 : 1024;
    spec.num_sinks = seed % 2 ? 4 : 0;
    spec.pool_size = seed % 4 == 3 ? 0 : 4 * spec.topk;
    if (seed % 4 == 0) spec.cu_seqlens = {0, 5000, 5001, 5001, 9000, spec.seqlen};
    const int chunk = seed % 6 == 5 ? 1008 : seed % 2 ? 1023 : 1024;
    SCOPED_TRACE(describe(spec, kind, seed, chunk));
    fmt::print("{}\n", describe(spec, kind, seed, chunk));
    expect_equals_cpu(to_f32(make_scores(kind, spec.batch, spec.seqlen, spec.num_kv_heads, seed)), spec, chunk);
    ++seed;
    if (HasFailure()) return;
  }
}

// More than 16 chunks: bounds drop arrivals and pool keys (kernels/cuda/select/bounds.cuh). Lengths around the switch
// and around the chunks at which bounds begin, documents that begin and end there, and scores that meet a bound: ties,
// topk keys far above equal ones (no fractions: tau is one below the last of them), few far away from the others.
TEST(CudaSelect, BoundsLeaveOutOnlyWhatNeverMatters) {
  SKIP_WITHOUT_DEVICE();
  constexpr int kChunk = 64;
  uint64_t seed = 0;
  for (const int64_t chunks : {16, 17, 25, 41}) {
    for (const int64_t more : {-1, 0, 1}) {
      for (const bool packed : {false, true}) {
        for (const int kind : {0, 1, 2, 3, 4}) {
          Spec spec;
          spec.seqlen = chunks * kChunk + more;
          spec.num_kv_heads = 2;
          spec.topk = 32;
          spec.window_size = seed % 2 ? 5 : 70;
          spec.num_sinks = static_cast<int64_t>(seed % 3);
          spec.pool_size = std::vector<int64_t>{0, 33, 90}[(seed + chunks) % 3];
          if (packed) spec.cu_seqlens = {0, 3, 8 * kChunk + more, spec.seqlen};
          Values scores = normal(spec.seqlen * 2, ++seed);
          for (int64_t i = 0; i < spec.seqlen * 2; ++i) {
            double& u = scores[i];
            if (kind == 1) u = std::round(u);
            if (kind == 2) u = std::round(4 * u) / 4;
            if (kind == 3) u = i / 2 >= 100 && i / 2 < 100 + spec.topk ? 5 : 0;
            if (kind == 4 && i / 2 % 150 == 7) u = u > 0 ? 1000 : -1000;
            u = static_cast<float>(u);
          }
          SCOPED_TRACE(fmt::format("T {} w {} s {} m {} documents {} kind {} seed {}", spec.seqlen, spec.window_size,
                                   spec.num_sinks, spec.pool_size, packed, kind, seed));
          expect_equals_reference(scores, spec, kChunk);
          if (HasFailure()) return;
        }
      }
    }
  }
}

// A document that ends inside a chunk makes its whole pool entries: more than shared memory holds.
TEST(CudaSelect, EntriesThatOutgrowSharedMemory) {
  SKIP_WITHOUT_DEVICE();
  for (const ScoreKind kind : {ScoreKind::kNormalSmall, ScoreKind::kEqual, ScoreKind::kNormal}) {
    Spec spec;
    spec.seqlen = 9000;
    spec.num_kv_heads = 2;
    spec.topk = 512;
    spec.window_size = 64;
    spec.pool_size = kind == ScoreKind::kNormal ? 0 : 6500;
    spec.cu_seqlens = {0, 7600, 9000};
    SCOPED_TRACE(name(kind));
    for (const int chunk : {1023, 1024})
      expect_equals_cpu(to_f32(make_scores(kind, 1, spec.seqlen, 2, 4)), spec, chunk);
  }
}

TEST(CudaSelect, RepeatsAreBitIdentical) {
  SKIP_WITHOUT_DEVICE();
  Spec spec;
  spec.seqlen = 12000;
  spec.num_kv_heads = 4;
  spec.topk = 300;
  spec.window_size = 128;
  spec.pool_size = 1200;
  const std::vector<float> scores = to_f32(make_scores(ScoreKind::kNormal, 1, spec.seqlen, 4, 6));
  Rows first_rows;
  const SelectResult<float> first = run_select_cuda(scores, spec, 1024, &first_rows);
  for (int repeat = 0; repeat < 20; ++repeat) {
    Rows rows;
    const SelectResult<float> again = run_select_cuda(scores, spec, 1024, &rows);
    ASSERT_TRUE(again.tau == first.tau && again.expiry == first.expiry && again.frac_begin == first.frac_begin &&
                again.frac_end == first.frac_end);
    ASSERT_TRUE(rows.live_count == first_rows.live_count && rows.live_classes == first_rows.live_classes);
    for (size_t list = 0; list < rows.live_count.size(); ++list) {
      for (int n = 0; n < rows.live_count[list]; ++n) {
        const cuda::LiveRow &a = rows.live[list * rows.capacity + n], &b = first_rows.live[list * rows.capacity + n];
        ASSERT_TRUE(a.row == b.row && a.begin == b.begin && a.end == b.end && a.u == b.u);
      }
    }
  }
}

TEST(CudaSelect, AMillionPositions) {
  SKIP_WITHOUT_DEVICE();
  Spec spec;
  spec.seqlen = 1048576;
  spec.topk = spec.window_size = 1024;
  spec.pool_size = 4096;
  for (const ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kRising}) {
    SCOPED_TRACE(name(kind));
    expect_equals_cpu(to_f32(make_scores(kind, 1, spec.seqlen, 1, 3)), spec, 1024);
  }
}

TEST(CudaSelect, ScoresThatAreNotFinitePoisonWhatComesLater) {
  SKIP_WITHOUT_DEVICE();
  Spec spec;
  spec.seqlen = 3000;
  spec.num_kv_heads = 2;
  spec.topk = 50;
  spec.window_size = 70;
  spec.num_sinks = 2;
  spec.pool_size = 200;
  spec.cu_seqlens = {0, 1800, 2500, 3000};
  const std::vector<float> clean = to_f32(normal(spec.seqlen * 2, 5));
  for (const int bad : {0, 500, 1799, 1800, 2300}) {
    for (const float value : {NAN, kInfinity, -kInfinity}) {
      std::vector<float> scores = clean;
      scores[bad * 2 + 1] = value;
      Rows rows;
      const SelectResult<float> actual = run_select_cuda(scores, spec, 256, &rows),
                                expected = run_select_cuda(clean, spec, 256);
      const int end = bad < 1800 ? 1800 : 2500;
      for (int i = 0; i < spec.seqlen; ++i) {
        ASSERT_EQ(actual.tau[i * 2], expected.tau[i * 2]) << "the other head, query " << i;
        if (i >= bad && i < end)
          ASSERT_TRUE(std::isnan(actual.tau[i * 2 + 1])) << "bad " << bad << " query " << i;
        else
          ASSERT_EQ(actual.tau[i * 2 + 1], expected.tau[i * 2 + 1]) << "bad " << bad << " query " << i;
        for (const int32_t x : {actual.expiry[i * 2 + 1], actual.frac_begin[i * 2 + 1], actual.frac_end[i * 2 + 1]})
          ASSERT_TRUE(x >= i && x <= spec.seqlen + spec.window_size);
      }
      for (size_t list = 0; list < rows.live_count.size(); ++list) ASSERT_LE(rows.live_count[list], rows.capacity);
    }
  }
}

}  // namespace
}  // namespace sparsek::test
