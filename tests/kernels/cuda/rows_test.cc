// Row arrays and lists of far rows on the GPU: row arrays exactly as kernels/cpu makes them, lists exactly as the
// intervals, scores and tau say.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>

#include "kernels/cpu/select/chunk_visibility.h"
#include "kernels/cpu/select/visibility.h"
#include "kernels/cuda/rows/live_lists.h"
#include "kernels/cuda/rows/visibility.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/select/run_select.h"

namespace sparsek::test {
namespace {

using reference::Spec;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int32_t pick(int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(engine_));
  }
  std::vector<int32_t> many(int64_t count, int64_t low, int64_t high) {
    std::vector<int32_t> values(count);
    for (int32_t& value : values) value = pick(low, high);
    return values;
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// --- visibility

template <class T>
void expect_visibility(const Spec& spec, bool heads_are_contiguous, bool with_tau, Random& random) {
  const int64_t size = spec.batch * spec.seqlen * spec.num_kv_heads, lanes = spec.batch * spec.num_kv_heads,
                positions = spec.batch * spec.seqlen;
  const Values u = make_scores(ScoreKind::kNormal, spec.batch, spec.seqlen, spec.num_kv_heads, random.pick(0, 1000)),
               t = normal(size, random.pick(0, 1000));
  const std::vector<T> scores(u.begin(), u.end());
  std::vector<T> tau(t.begin(), t.end());
  for (int64_t n = 0; n < size; n += 3) tau[n] = -std::numeric_limits<T>::infinity();
  // Any integers: another selection than ours.
  const std::vector<int32_t> expiry = random.many(size, -5, spec.seqlen + 20),
                             frac_begin = random.many(size, -5, spec.seqlen + 20),
                             frac_end = random.many(size, -5, spec.seqlen + 20),
                             cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
  VisibilityParams params{};
  params.dtype = kDType<T>;
  params.scores_strides = contiguous(spec.seqlen, spec.num_kv_heads);
  params.tau_strides = params.index_strides =
      heads_are_contiguous ? params.scores_strides : Strides{spec.seqlen * spec.num_kv_heads, 1, spec.seqlen};
  params.batch = static_cast<int32_t>(spec.batch), params.seqlen = static_cast<int32_t>(spec.seqlen);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.num_documents = cu_seqlens.empty() ? 1 : static_cast<int32_t>(cu_seqlens.size()) - 1;
  params.window_size = static_cast<int32_t>(spec.window_size);
  params.num_sinks = static_cast<int32_t>(spec.num_sinks);

  std::vector<T> row_scores(size), row_tau(size);
  std::vector<int32_t> window_begin(positions), far_begin(size), far_end(size), row_frac_begin(size),
      row_frac_end(size);
  VisibilityParams on_cpu = params;
  on_cpu.scores = scores.data(), on_cpu.tau = tau.data(), on_cpu.expiry = expiry.data(),
  on_cpu.frac_begin = frac_begin.data(), on_cpu.frac_end = frac_end.data();
  on_cpu.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  on_cpu.row_scores = row_scores.data(), on_cpu.row_tau = row_tau.data(), on_cpu.window_begin = window_begin.data(),
  on_cpu.far_begin = far_begin.data(), on_cpu.far_end = far_end.data(), on_cpu.row_frac_begin = row_frac_begin.data(),
  on_cpu.row_frac_end = row_frac_end.data();
  cpu::visibility(on_cpu);

  const DeviceArray<T> in_scores(scores), in_tau(tau), out_scores(size), out_tau(size);
  const DeviceArray<int32_t> in_expiry(expiry), in_begin(frac_begin), in_end(frac_end), starts(cu_seqlens),
      out_window(positions), out_far_begin(size), out_far_end(size), out_begin(size), out_end(size);
  VisibilityParams on_gpu = params;
  on_gpu.scores = in_scores.data(), on_gpu.tau = in_tau.data(), on_gpu.expiry = in_expiry.data(),
  on_gpu.frac_begin = in_begin.data(), on_gpu.frac_end = in_end.data();
  on_gpu.cu_seqlens = cu_seqlens.empty() ? nullptr : starts.data();
  on_gpu.row_scores = out_scores.data(), on_gpu.row_tau = with_tau ? out_tau.data() : nullptr,
  on_gpu.window_begin = out_window.data(), on_gpu.far_begin = out_far_begin.data(), on_gpu.far_end = out_far_end.data(),
  on_gpu.row_frac_begin = out_begin.data(), on_gpu.row_frac_end = out_end.data();
  cuda::visibility(on_gpu, nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "visibility");
  EXPECT_ALL_EQUAL(out_scores.to_vector(), row_scores);
  if (with_tau) {
    EXPECT_ALL_EQUAL(out_tau.to_vector(), row_tau);
  }
  EXPECT_ALL_EQUAL(out_window.to_vector(), window_begin);
  EXPECT_ALL_EQUAL(out_far_begin.to_vector(), far_begin);
  EXPECT_ALL_EQUAL(out_far_end.to_vector(), far_end);
  EXPECT_ALL_EQUAL(out_begin.to_vector(), row_frac_begin);
  EXPECT_ALL_EQUAL(out_end.to_vector(), row_frac_end);
  ASSERT_GE(lanes, 1);
}

TEST(CudaRows, VisibilityEqualsCpu) {
  SKIP_WITHOUT_DEVICE();
  Random random(1);
  for (int n = 0; n < 60; ++n) {
    Spec spec = random_spec(random.engine(), 150, 1, 40);
    if (n % 6 == 0) spec.num_kv_heads = 33;  // more than a tile
    SCOPED_TRACE(fmt::format("case {} B {} T {} H {} w {} s {}", n, spec.batch, spec.seqlen, spec.num_kv_heads,
                             spec.window_size, spec.num_sinks));
    expect_visibility<float>(spec, n % 2 == 0, n % 5 != 0, random);
    expect_visibility<double>(spec, n % 3 == 0, true, random);
    if (HasFailure()) return;
  }
}

// --- chunk_visibility

struct ChunkRows {
  std::vector<int32_t> window_begin, far_begin, far_end, frac_begin, frac_end;
  std::vector<uint8_t> is_sink;
  std::vector<int64_t> carried_source, state_source;
};

// What select_chunk leaves: any integers.
struct ChunkSelection {
  std::vector<int64_t> lengths;
  std::vector<int32_t> slots[3], pool[2], arrivals[3], new_slot_source;
};

ChunkVisibilityParams chunk_sizes(Random& random, int n) {
  ChunkVisibilityParams p{};
  p.batch = random.pick(1, 3), p.num_kv_heads = random.pick(1, 3);
  p.chunk = n % 4 == 0 ? random.pick(1, 5) : random.pick(1, 400);
  p.topk = random.pick(1, n % 3 == 0 ? 300 : 9), p.window_size = random.pick(1, n % 5 == 0 ? 500 : 12);
  p.num_sinks = n % 2 ? random.pick(1, 20) : 0, p.pool_capacity = random.pick(1, 700);
  return p;
}

ChunkSelection any_selection(const ChunkVisibilityParams& p, Random& random) {
  ChunkSelection s;
  const int64_t lanes = int64_t{p.batch} * p.num_kv_heads;
  for (int b = 0; b < p.batch; ++b) {
    s.lengths.push_back(b == 1 ? (int64_t{1} << 60) : random.pick(0, 2) ? random.pick(0, 1000) : random.pick(0, 9));
  }
  for (auto& values : s.slots) values = random.many(lanes * p.topk, 0, p.chunk);
  for (auto& values : s.pool) values = random.many(lanes * p.pool_capacity, 0, p.chunk);
  for (auto& values : s.arrivals) values = random.many(lanes * p.chunk, 0, p.chunk);
  s.new_slot_source = random.many(lanes * p.topk, -1, p.topk + p.chunk - 1);
  return s;
}

ChunkRows chunk_rows_cuda(const ChunkVisibilityParams& sizes, const ChunkSelection& s) {
  const int64_t lanes = int64_t{sizes.batch} * sizes.num_kv_heads,
                carried = int64_t{sizes.topk} + sizes.num_sinks + sizes.window_size, rows = carried + sizes.chunk;
  const DeviceArray<int64_t> lengths(s.lengths), carried_source(lanes * carried), state_source(lanes * carried);
  const DeviceArray<int32_t> slot_expiry(s.slots[0]), slot_begin(s.slots[1]), slot_end(s.slots[2]),
      pool_begin(s.pool[0]), pool_end(s.pool[1]), expiry(s.arrivals[0]), begin(s.arrivals[1]), end(s.arrivals[2]),
      source(s.new_slot_source), window_begin(int64_t{sizes.batch} * sizes.chunk), far_begin(lanes * rows),
      far_end(lanes * rows), frac_begin(lanes * (sizes.pool_capacity + rows)),
      frac_end(lanes * (sizes.pool_capacity + rows));
  const DeviceArray<uint8_t> is_sink(sizes.batch * rows);
  ChunkVisibilityParams p = sizes;
  p.lengths = lengths.data();
  p.slot_expiry = slot_expiry.data(), p.slot_frac_begin = slot_begin.data(), p.slot_frac_end = slot_end.data();
  p.pool_frac_begin = pool_begin.data(), p.pool_frac_end = pool_end.data();
  p.arrival_expiry = expiry.data(), p.arrival_frac_begin = begin.data(), p.arrival_frac_end = end.data();
  p.new_slot_source = source.data();
  p.window_begin = window_begin.data(), p.far_begin = far_begin.data(), p.far_end = far_end.data();
  p.frac_begin = frac_begin.data(), p.frac_end = frac_end.data();
  p.is_sink = reinterpret_cast<bool*>(is_sink.data());
  p.carried_source = carried_source.data(), p.state_source = state_source.data();
  cuda::chunk_visibility(p, nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "chunk_visibility");
  return {window_begin.to_vector(), far_begin.to_vector(), far_end.to_vector(),        frac_begin.to_vector(),
          frac_end.to_vector(),     is_sink.to_vector(),   carried_source.to_vector(), state_source.to_vector()};
}

ChunkRows chunk_rows_cpu(const ChunkVisibilityParams& sizes, const ChunkSelection& s) {
  const int64_t lanes = int64_t{sizes.batch} * sizes.num_kv_heads,
                carried = int64_t{sizes.topk} + sizes.num_sinks + sizes.window_size, rows = carried + sizes.chunk;
  ChunkRows r;
  r.window_begin.resize(int64_t{sizes.batch} * sizes.chunk), r.far_begin.resize(lanes * rows),
      r.far_end.resize(lanes * rows);
  r.frac_begin.resize(lanes * (sizes.pool_capacity + rows)), r.frac_end.resize(lanes * (sizes.pool_capacity + rows));
  r.is_sink.resize(sizes.batch * rows), r.carried_source.resize(lanes * carried),
      r.state_source.resize(lanes * carried);
  ChunkVisibilityParams p = sizes;
  p.lengths = s.lengths.data();
  p.slot_expiry = s.slots[0].data(), p.slot_frac_begin = s.slots[1].data(), p.slot_frac_end = s.slots[2].data();
  p.pool_frac_begin = s.pool[0].data(), p.pool_frac_end = s.pool[1].data();
  p.arrival_expiry = s.arrivals[0].data(), p.arrival_frac_begin = s.arrivals[1].data(),
  p.arrival_frac_end = s.arrivals[2].data();
  p.new_slot_source = s.new_slot_source.data();
  p.window_begin = r.window_begin.data(), p.far_begin = r.far_begin.data(), p.far_end = r.far_end.data();
  p.frac_begin = r.frac_begin.data(), p.frac_end = r.frac_end.data();
  p.is_sink = reinterpret_cast<bool*>(r.is_sink.data());
  p.carried_source = r.carried_source.data(), p.state_source = r.state_source.data();
  cpu::chunk_visibility(p);
  return r;
}

TEST(CudaRows, ChunkVisibilityEqualsCpu) {
  SKIP_WITHOUT_DEVICE();
  Random random(2);
  for (int n = 0; n < 80; ++n) {
    const ChunkVisibilityParams sizes = chunk_sizes(random, n);
    const ChunkSelection selection = any_selection(sizes, random);
    SCOPED_TRACE(fmt::format("case {} B {} H {} chunk {} k {} w {} s {}", n, sizes.batch, sizes.num_kv_heads,
                             sizes.chunk, sizes.topk, sizes.window_size, sizes.num_sinks));
    const ChunkRows actual = chunk_rows_cuda(sizes, selection), expected = chunk_rows_cpu(sizes, selection);
    EXPECT_EQ(actual.window_begin, expected.window_begin);
    EXPECT_EQ(actual.far_begin, expected.far_begin);
    EXPECT_EQ(actual.far_end, expected.far_end);
    EXPECT_EQ(actual.frac_begin, expected.frac_begin);
    EXPECT_EQ(actual.frac_end, expected.frac_end);
    EXPECT_EQ(actual.is_sink, expected.is_sink);
    EXPECT_EQ(actual.carried_source, expected.carried_source);
    EXPECT_EQ(actual.state_source, expected.state_source);
    if (HasFailure()) return;
  }
}

TEST(CudaRows, ChunkVisibilityKeepsIndicesInRange) {
  SKIP_WITHOUT_DEVICE();
  Random random(3);
  for (int n = 0; n < 20; ++n) {
    const ChunkVisibilityParams sizes = chunk_sizes(random, n);
    ChunkSelection selection = any_selection(sizes, random);
    for (int64_t& length : selection.lengths) length = n % 2 ? -random.pick(1, 1000) : INT64_MAX - random.pick(0, 9);
    for (int32_t& source : selection.new_slot_source) source = n % 3 ? INT32_MAX - random.pick(0, 9) : INT32_MIN;
    const ChunkRows actual = chunk_rows_cuda(sizes, selection);
    const int64_t lanes = int64_t{sizes.batch} * sizes.num_kv_heads,
                  carried = int64_t{sizes.topk} + sizes.num_sinks + sizes.window_size, rows = carried + sizes.chunk;
    for (const int64_t source : actual.carried_source) ASSERT_TRUE(source >= 0 && source < lanes * carried);
    for (const int64_t source : actual.state_source) ASSERT_TRUE(source >= 0 && source < lanes * rows);
    for (size_t i = 0; i < actual.window_begin.size(); ++i) {
      ASSERT_TRUE(actual.window_begin[i] >= sizes.topk + sizes.num_sinks &&
                  actual.window_begin[i] <= carried + static_cast<int64_t>(i) % sizes.chunk);
    }
  }
}

// --- window_rows

TEST(CudaRows, WindowRowsEqualCpu) {
  SKIP_WITHOUT_DEVICE();
  Random random(4);
  for (int n = 0; n < 80; ++n) {
    const Spec spec = random_spec(random.engine(), 700, 1, 200);
    const bool carried = n % 2 == 0 && spec.cu_seqlens.empty();
    SCOPED_TRACE(fmt::format("case {} B {} T {} w {} s {} carried {}", n, spec.batch, spec.seqlen, spec.window_size,
                             spec.num_sinks, carried));
    const int64_t rows = spec.seqlen + (carried ? spec.num_sinks + spec.window_size : 0);
    std::vector<int64_t> lengths(spec.batch);
    for (int64_t& length : lengths) length = random.pick(0, 3) ? random.pick(0, 900) : int64_t{1} << 60;
    const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
    std::vector<int32_t> window_begin(spec.batch * spec.seqlen), far_begin(spec.batch * rows),
        far_end(spec.batch * rows), num_queries(carried ? 0 : spec.batch * spec.seqlen);
    WindowRowsParams params{};
    params.batch = static_cast<int32_t>(spec.batch), params.seqlen = static_cast<int32_t>(spec.seqlen);
    params.num_documents = cu_seqlens.empty() ? 1 : static_cast<int32_t>(cu_seqlens.size()) - 1;
    params.window_size = static_cast<int32_t>(spec.window_size);
    params.num_sinks = static_cast<int32_t>(spec.num_sinks);
    WindowRowsParams on_cpu = params;
    on_cpu.lengths = carried ? lengths.data() : nullptr;
    on_cpu.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    on_cpu.window_begin = window_begin.data(), on_cpu.far_begin = far_begin.data(), on_cpu.far_end = far_end.data(),
    on_cpu.num_queries = num_queries.data();
    cpu::window_rows(on_cpu);
    const DeviceArray<int64_t> in_lengths(lengths);
    const DeviceArray<int32_t> starts(cu_seqlens), out_window(std::ssize(window_begin)),
        out_begin(std::ssize(far_begin)), out_end(std::ssize(far_end)), out_queries(std::ssize(num_queries));
    WindowRowsParams on_gpu = params;
    on_gpu.lengths = carried ? in_lengths.data() : nullptr;
    on_gpu.cu_seqlens = cu_seqlens.empty() ? nullptr : starts.data();
    on_gpu.window_begin = out_window.data(), on_gpu.far_begin = out_begin.data(), on_gpu.far_end = out_end.data(),
    on_gpu.num_queries = out_queries.data();
    cuda::window_rows(on_gpu, nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "window_rows");
    EXPECT_EQ(out_window.to_vector(), window_begin);
    EXPECT_EQ(out_begin.to_vector(), far_begin);
    EXPECT_EQ(out_end.to_vector(), far_end);
    EXPECT_EQ(out_queries.to_vector(), num_queries);
    if (HasFailure()) return;
  }
}

TEST(CudaRows, CuSeqlensThatNobodyCheckedStayInRange) {
  SKIP_WITHOUT_DEVICE();
  Random random(5);
  const int32_t seqlen = 300;
  for (int n = 0; n < 20; ++n) {
    const DeviceArray<int32_t> starts(random.many(6, -400, 900));
    const DeviceArray<int32_t> window_begin(seqlen), far_begin(seqlen), far_end(seqlen), num_queries(seqlen);
    WindowRowsParams params{};
    params.cu_seqlens = starts.data(), params.num_documents = 5;
    params.window_begin = window_begin.data(), params.far_begin = far_begin.data(), params.far_end = far_end.data(),
    params.num_queries = num_queries.data();
    params.batch = 1, params.seqlen = seqlen, params.window_size = 40, params.num_sinks = 3;
    cuda::window_rows(params, nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "window_rows");
    const std::vector<int32_t> window = window_begin.to_vector(), end = far_end.to_vector();
    for (int i = 0; i < seqlen; ++i) {
      ASSERT_TRUE(window[i] >= std::max(0, i - 39) && window[i] <= i);
      ASSERT_TRUE(end[i] >= i && end[i] <= seqlen);
    }
  }
}

// --- lists of far rows

struct AnyRows {
  int32_t lanes = 1, seqlen_q = 1, seqlen_k = 1;
  std::vector<int32_t> far_begin, far_end;
  std::vector<float> scores, tau;
};

struct Lists {
  std::vector<cuda::LiveRow> rows;
  std::vector<int32_t> count, classes;
  std::vector<float> tau;
};

Lists live_lists_cuda(const AnyRows& rows, int chunk, int capacity) {
  const int64_t lists = int64_t{rows.lanes} * ((rows.seqlen_q + chunk - 1) / chunk);
  const DeviceArray<int32_t> begin(rows.far_begin), end(rows.far_end), count(lists), classes(2 * lists);
  const DeviceArray<float> scores(rows.scores), tau(rows.tau), checked_tau(std::ssize(rows.tau));
  const DeviceArray<cuda::LiveRow> out(lists * capacity);
  AttentionFwdParams params{};
  params.dtype = DType::kBF16;
  params.far_begin = begin.data(), params.far_end = end.data(), params.scores = scores.data(), params.tau = tau.data();
  params.batch = 1, params.num_kv_heads = rows.lanes, params.seqlen_q = rows.seqlen_q, params.seqlen_k = rows.seqlen_k;
  const DeviceArray<uint8_t> workspace(cuda::live_lists_workspace_bytes(params, chunk));
  cuda::live_lists(params, chunk, {out.data(), count.data(), classes.data(), capacity, capacity}, checked_tau.data(),
                   workspace.data(), nullptr);
  cuda::check_cuda(cudaDeviceSynchronize(), "live_lists");
  return {out.to_vector(), count.to_vector(), classes.to_vector(), checked_tau.to_vector()};
}

// tau, or NaN at the queries of lists that were cut, where `cut` says so.
void expect_tau(const AnyRows& rows, int chunk, const Lists& lists, const std::vector<bool>& cut) {
  const int num_chunks = (rows.seqlen_q + chunk - 1) / chunk;
  for (int64_t n = 0; n < std::ssize(rows.tau); ++n) {
    const int64_t list = n / rows.seqlen_q * num_chunks + n % rows.seqlen_q / chunk;
    if (cut[list] || std::isnan(rows.tau[n]))
      ASSERT_TRUE(std::isnan(lists.tau[n])) << "query " << n << " of list " << list;
    else
      ASSERT_EQ(lists.tau[n], rows.tau[n]) << "query " << n << " of list " << list;
  }
}

void expect_lists(const AnyRows& rows, int chunk) {
  const int num_chunks = (rows.seqlen_q + chunk - 1) / chunk;
  std::vector<std::vector<cuda::LiveRow>> expected(int64_t{rows.lanes} * num_chunks * 3);
  for (int64_t lane = 0; lane < rows.lanes; ++lane) {
    for (int c = 0; c < num_chunks; ++c) {
      const int first = c * chunk, end = std::min(first + chunk, rows.seqlen_q);
      const float* tau = &rows.tau[lane * rows.seqlen_q];
      for (int r = 0; r < rows.seqlen_k; ++r) {
        const int64_t at = lane * rows.seqlen_k + r;
        const int row_begin = std::max(rows.far_begin[at], 0), row_end = std::min(rows.far_end[at], rows.seqlen_q);
        if (row_begin >= row_end || row_begin >= end || row_end <= first) continue;
        bool all_one = row_begin <= first && row_end >= end, all_fraction = all_one;
        for (int i = first; i < end && (all_one || all_fraction); ++i) {
          const float p = rows.scores[at] - tau[i];
          all_one &= p >= 1, all_fraction &= p > 0 && p < 1;
        }
        expected[(lane * num_chunks + c) * 3 + (all_one        ? 0
                                                : all_fraction ? 1
                                                               : 2)]
            .push_back({r, row_begin, std::min(row_end, end), rows.scores[at]});
      }
    }
  }
  size_t longest = 1;
  for (size_t n = 0; n < expected.size(); n += 3)
    longest = std::max(longest, expected[n].size() + expected[n + 1].size() + expected[n + 2].size());
  const auto capacity = static_cast<int>(longest);
  const Lists actual = live_lists_cuda(rows, chunk, capacity);
  expect_tau(rows, chunk, actual, std::vector<bool>(int64_t{rows.lanes} * num_chunks));
  for (int64_t list = 0; list < int64_t{rows.lanes} * num_chunks; ++list) {
    int64_t n = 0;
    for (int kind = 0; kind < 3; ++kind) {
      for (const cuda::LiveRow& x : expected[list * 3 + kind]) {
        const cuda::LiveRow& y = actual.rows[list * capacity + n++];
        ASSERT_TRUE(x.row == y.row && x.begin == y.begin && x.end == y.end && x.u == y.u)
            << fmt::format("list {} place {} class {}: want row {} [{}, {}) {}, got {} [{}, {}) {}", list, n - 1, kind,
                           x.row, x.begin, x.end, x.u, y.row, y.begin, y.end, y.u);
      }
      ASSERT_EQ(kind < 2 ? actual.classes[list * 2 + kind] : actual.count[list], n) << "list " << list;
    }
  }
}

// Like a selection: a row begins where it leaves the window, some live long.
AnyRows falling_rows(int lanes, int seqlen_q, int seqlen_k, Random& random) {
  AnyRows rows{lanes, seqlen_q, seqlen_k, {}, {}, {}, {}};
  for (int lane = 0; lane < lanes; ++lane) {
    for (int r = 0; r < seqlen_k; ++r) {
      const int begin = std::clamp(r - (seqlen_k - seqlen_q) / 2, 0, seqlen_q);
      const int life = random.pick(0, 3) ? random.pick(0, 40) : random.pick(0, 2000);
      rows.far_begin.push_back(begin), rows.far_end.push_back(std::min(begin + life, seqlen_q));
      rows.scores.push_back(random.pick(0, 30) ? 0.001f * static_cast<float>(random.pick(-2000, 2000)) : kInfinity);
    }
    float tau = -kInfinity;
    for (int i = 0; i < seqlen_q; ++i) {
      if (i == seqlen_q / 10) tau = -1.5f;
      if (i > seqlen_q / 10) tau += 0.002f * static_cast<float>(random.pick(0, 1));
      rows.tau.push_back(tau);
    }
  }
  return rows;
}

TEST(CudaLiveLists, FallingRows) {
  SKIP_WITHOUT_DEVICE();
  Random random(6);
  for (const auto& [seqlen_q, seqlen_k] : std::vector<std::pair<int, int>>{
           {1, 1}, {1, 900}, {5, 2050}, {1000, 1000}, {1024, 3073}, {2500, 2500}, {4096, 6148}, {5003, 5003}}) {
    for (const int chunk : {1, 7, 64, 1008, 1024}) {
      if (chunk == 1 && seqlen_q > 100) continue;
      SCOPED_TRACE(fmt::format("queries {} rows {} chunk {}", seqlen_q, seqlen_k, chunk));
      expect_lists(falling_rows(2, seqlen_q, seqlen_k, random), chunk);
      if (HasFailure()) return;
    }
  }
}

// Intervals in any order, empty ones and such that reach beyond the queries, tau that falls and is NaN.
TEST(CudaLiveLists, AnyRowsAndTau) {
  SKIP_WITHOUT_DEVICE();
  Random random(7);
  for (int n = 0; n < 30; ++n) {
    AnyRows rows{random.pick(1, 3), random.pick(1, 900), random.pick(1, 4000), {}, {}, {}, {}};
    const int chunk = random.pick(1, 200);
    SCOPED_TRACE(fmt::format("case {} queries {} rows {} chunk {}", n, rows.seqlen_q, rows.seqlen_k, chunk));
    const int64_t size = int64_t{rows.lanes} * rows.seqlen_k;
    rows.far_begin = random.many(size, -50, rows.seqlen_q + 50), rows.far_end = random.many(size, -50, 950);
    rows.scores = to_f32(normal(size, n, 1.0)), rows.tau = to_f32(normal(rows.lanes * rows.seqlen_q, n + 100, 0.01));
    if (n % 3 == 0) rows.tau[random.pick(0, rows.seqlen_q - 1)] = NAN;
    expect_lists(rows, chunk);
    if (HasFailure()) return;
  }
}

// More parts of rows than are scanned at once, so that a part has several steps.
TEST(CudaLiveLists, ManyRows) {
  SKIP_WITHOUT_DEVICE();
  Random random(8);
  expect_lists(falling_rows(1, 3000, 140000, random), 1024);
  AnyRows rows = falling_rows(1, 200000, 200000, random);
  expect_lists(rows, 10000);
}

// A list with more rows than room is cut off and its queries' tau becomes NaN; one that is just full is whole.
TEST(CudaLiveLists, ListsThatOverflowPoisonTheirQueries) {
  SKIP_WITHOUT_DEVICE();
  Random random(9);
  for (const auto& [seqlen_q, seqlen_k, chunk] :
       std::vector<std::tuple<int, int, int>>{{1000, 3000, 100}, {1, 900, 1}, {5003, 5003, 1008}}) {
    const AnyRows rows = falling_rows(2, seqlen_q, seqlen_k, random);
    const Lists whole = live_lists_cuda(rows, chunk, seqlen_k);
    std::vector<int32_t> sorted = whole.count;
    std::sort(sorted.begin(), sorted.end());
    for (const int32_t capacity : {sorted[sorted.size() / 2], sorted.back(), sorted.back() - 1, 1}) {
      SCOPED_TRACE(fmt::format("queries {} rows {} chunk {} capacity {}", seqlen_q, seqlen_k, chunk, capacity));
      const Lists lists = live_lists_cuda(rows, chunk, capacity);  // guards around the lists are checked
      std::vector<bool> cut;
      for (size_t list = 0; list < lists.count.size(); ++list) {
        cut.push_back(whole.count[list] > capacity);
        EXPECT_EQ(lists.count[list], std::min(whole.count[list], capacity));
        for (size_t n = 2 * list; n < 2 * list + 2; ++n)
          EXPECT_EQ(lists.classes[n], std::min(whole.classes[n], capacity));
      }
      expect_tau(rows, chunk, lists, cut);
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace sparsek::test
