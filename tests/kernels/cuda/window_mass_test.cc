// eq. 1b on the GPU against kernels/reference: whole sequences, documents and chunks behind carried rows, both element
// types, groups, sinks with and without far rotary, softmaxes that are flat, peaked and beyond what float32 holds.
#include "kernels/cuda/window_mass/window_mass.h"

#include <cuda_fp16.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/rows/visibility.h"
#include "kernels/reference/reference.h"
#include "tests/kernels/cuda/device.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"

namespace sparsek::test {
namespace {

using reference::Spec;

struct Case {
  Spec spec;
  bool is_half = false, far = false;
  double deviation = 1;  // of q
  uint64_t seed = 1;
};

std::string describe(const Case& c) {
  const Spec& s = c.spec;
  return fmt::format("B {} T {} heads {}/{} dim {} w {} s {} documents {} {} far {} deviation {}", s.batch, s.seqlen,
                     s.num_heads, s.num_kv_heads, s.head_dim, s.window_size, s.num_sinks,
                     s.cu_seqlens.empty() ? 1 : s.cu_seqlens.size() - 1, c.is_half ? "fp16" : "bf16", c.far,
                     c.deviation);
}

uint16_t to_bits(double x, bool is_half) {
  if (!is_half) return to_bf16(static_cast<float>(x)).bits;
  const __half value = __float2half(static_cast<float>(x));
  return static_cast<__half_raw>(value).x;
}
double from_bits(uint16_t bits, bool is_half) {
  if (!is_half) return to_float(BFloat16{bits});
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

class Problem {
 public:
  explicit Problem(const Case& c) : c_(c), spec_(c.spec) {
    const int64_t tokens = spec_.batch * spec_.seqlen;
    const auto fill = [&](std::vector<uint16_t>& bits, Values& values, int64_t heads, uint64_t seed, double deviation) {
      for (const double x : normal(tokens * heads * spec_.head_dim, c.seed * 100 + seed, deviation)) {
        bits.push_back(to_bits(x, c.is_half)), values.push_back(from_bits(bits.back(), c.is_half));
      }
    };
    fill(q, inputs.q, spec_.num_heads, 1, c.deviation), fill(k, inputs.k, spec_.num_kv_heads, 2, 1);
    if (c.far) {
      fill(q_far, inputs.q_far, spec_.num_heads, 3, c.deviation);
      fill(k_far, inputs.k_far, spec_.num_kv_heads, 4, 1);
    }
    inputs.v = inputs.k, inputs.scores = Values(tokens * spec_.num_kv_heads, 0.0);
  }
  // [batch, num_kv_heads, seqlen]
  Values expected() const {
    const Values mass = reference::window_mass(inputs, spec_).mass;
    Values by_lane(mass.size());
    for (int64_t b = 0; b < spec_.batch; ++b) {
      for (int64_t i = 0; i < spec_.seqlen; ++i) {
        for (int64_t h = 0; h < spec_.num_kv_heads; ++h)
          by_lane[(b * spec_.num_kv_heads + h) * spec_.seqlen + i] =
              mass[(b * spec_.seqlen + i) * spec_.num_kv_heads + h];
      }
    }
    return by_lane;
  }

  // Queries from `begin` on behind their window's rows, by the rows of window_rows; what no query reads is NaN.
  // mass: [batch, num_kv_heads, seqlen] so far, changed. `begin` 0 and `end` seqlen: a whole sequence, nothing carried.
  void run(int64_t begin, int64_t end, cuda::KernelChoice choice, std::vector<float>& mass) const {
    const bool is_whole = begin == 0 && end == spec_.seqlen;
    const int64_t batch = spec_.batch, chunk = end - begin, dim = spec_.head_dim, kv_heads = spec_.num_kv_heads,
                  carried = is_whole ? 0 : spec_.num_sinks + spec_.window_size, rows = carried + chunk;
    const DeviceArray<int64_t> lengths(std::vector<int64_t>(batch, begin));
    const DeviceArray<int32_t> cu_seqlens(std::vector<int32_t>(spec_.cu_seqlens.begin(), spec_.cu_seqlens.end()));
    const DeviceArray<int32_t> window_begin(batch * chunk), far_begin(batch * rows), far_end(batch * rows),
        num_queries(batch * chunk);
    WindowRowsParams layout{};
    layout.lengths = is_whole ? nullptr : lengths.data();
    layout.cu_seqlens = spec_.cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    layout.window_begin = window_begin.data(), layout.far_begin = far_begin.data(), layout.far_end = far_end.data(),
    layout.num_queries = num_queries.data();
    layout.batch = static_cast<int32_t>(batch), layout.seqlen = static_cast<int32_t>(chunk);
    layout.num_documents = spec_.cu_seqlens.empty() ? 1 : static_cast<int32_t>(spec_.cu_seqlens.size()) - 1;
    layout.window_size = static_cast<int32_t>(spec_.window_size);
    layout.num_sinks = static_cast<int32_t>(spec_.num_sinks);
    cuda::window_rows(layout, nullptr);
    cuda::check_cuda(cudaDeviceSynchronize(), "window_rows");

    const std::vector<int32_t> begins = far_begin.to_vector(), ends = far_end.to_vector();
    std::vector<uint16_t> rows_k(batch * rows * kv_heads * dim, 0x7fff), rows_far(rows_k);  // NaN
    std::vector<float> mass_in(batch * kv_heads * rows, 0.0f);
    const auto position_of = [&](int64_t r) {
      if (is_whole) return r;
      const int64_t position = r < spec_.num_sinks ? r : begin + r - carried;
      return r < spec_.num_sinks && position >= begin ? -1 : position;
    };
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t position = position_of(r);
        if (position < 0) continue;
        const bool is_far = begins[b * rows + r] < ends[b * rows + r], is_sink_row = !is_whole && r < spec_.num_sinks;
        for (int64_t h = 0; h < kv_heads; ++h) {
          const int64_t to = ((b * rows + r) * kv_heads + h) * dim,
                        from = ((b * spec_.seqlen + position) * kv_heads + h) * dim;
          if (!c_.far || !is_sink_row) std::copy_n(k.begin() + from, dim, rows_k.begin() + to);
          if (c_.far && is_far) std::copy_n(k_far.begin() + from, dim, rows_far.begin() + to);
          if (!is_sink_row) {
            mass_in[(b * kv_heads + h) * rows + r] = mass[(b * kv_heads + h) * spec_.seqlen + position];
          }
        }
      }
    }
    // Queries with a gap between the batch rows and one between the positions.
    const int64_t q_row = spec_.num_heads * dim, q_seq = q_row + 16, q_batch = chunk * q_seq + 64;
    const auto queries = [&](const std::vector<uint16_t>& all) {
      std::vector<uint16_t> part(batch * q_batch, 0x7fff);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < chunk; ++i)
          std::copy_n(all.begin() + (b * spec_.seqlen + begin + i) * q_row, q_row,
                      part.begin() + b * q_batch + i * q_seq);
      }
      return part;
    };
    const DeviceArray<uint16_t> d_q(queries(q)), d_k(rows_k),
        d_q_far(c_.far ? queries(q_far) : std::vector<uint16_t>()), d_k_far(rows_far);
    const DeviceArray<float> d_in(mass_in), d_mass(batch * kv_heads * rows);
    WindowMassParams params{};
    params.dtype = c_.is_half ? DType::kF16 : DType::kBF16;
    params.q = d_q.data(), params.k = d_k.data();
    if (c_.far) params.q_far = d_q_far.data(), params.k_far = d_k_far.data();
    params.window_begin = window_begin.data(), params.far_begin = far_begin.data(), params.far_end = far_end.data();
    params.mass_in = begin == 0 ? nullptr : d_in.data(), params.mass = d_mass.data();
    params.q_strides = params.q_far_strides = {q_batch, q_seq, dim};
    params.k_strides = params.k_far_strides = {rows * kv_heads * dim, kv_heads * dim, dim};
    params.batch = static_cast<int32_t>(batch), params.seqlen_q = static_cast<int32_t>(chunk),
    params.seqlen_k = static_cast<int32_t>(rows), params.num_carried = static_cast<int32_t>(carried);
    params.num_heads = static_cast<int32_t>(spec_.num_heads), params.num_kv_heads = static_cast<int32_t>(kv_heads);
    params.head_dim = static_cast<int32_t>(dim), params.window_size = static_cast<int32_t>(spec_.window_size);
    params.softmax_scale = spec_.softmax_scale;
    const DeviceArray<uint8_t> workspace(cuda::window_mass_workspace_bytes(params));
    cuda::window_mass(params, workspace.data(), nullptr, choice);
    cuda::check_cuda(cudaDeviceSynchronize(), "window_mass");
    const std::vector<float> out = d_mass.to_vector();
    cuda::window_mass(params, workspace.data(), nullptr, choice);
    cuda::check_cuda(cudaDeviceSynchronize(), "window_mass");
    EXPECT_EQ(std::memcmp(out.data(), d_mass.to_vector().data(), out.size() * sizeof(float)), 0)
        << "differs in a repeat";
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = is_whole ? 0 : spec_.num_sinks; r < rows; ++r) {
        if (position_of(r) < 0) continue;
        for (int64_t h = 0; h < kv_heads; ++h)
          mass[(b * kv_heads + h) * spec_.seqlen + position_of(r)] = out[(b * kv_heads + h) * rows + r];
      }
    }
  }

 private:
  Case c_;
  Spec spec_;
  std::vector<uint16_t> q, k, q_far, k_far;
  reference::AttentionInputs inputs;
};

// Relative to every key's own mass. Products of 16-bit inputs are exact in float32, so what a plain evaluation in that
// precision errs is the rounding of logits and sums: about 1e-6, and a logit's size in units of float32 when peaked.
double tolerance_of(const Case& c) {
  return 2e-5 * std::max(1.0, c.deviation / 4);
}
void expect_close(const std::vector<float>& actual, const Values& expected, const Case& c) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t n = 0; n < actual.size(); ++n) {
    const double limit = tolerance_of(c) * std::abs(expected[n]) + 1e-12;
    ASSERT_TRUE(std::abs(actual[n] - expected[n]) <= limit)
        << "key " << n % c.spec.seqlen << " lane " << n / c.spec.seqlen << ": want " << expected[n] << ", got "
        << actual[n];
  }
}

// In one call or in several, by both sets of kernels.
void expect_chunks(const Case& c, const std::vector<int64_t>& ends) {
  const Problem problem(c);
  const Values expected = problem.expected();
  for (const cuda::KernelChoice choice : {cuda::KernelChoice::kPortable, cuda::KernelChoice::kAutomatic}) {
    SCOPED_TRACE(describe(c) + (choice == cuda::KernelChoice::kPortable ? " portable" : " automatic"));
    std::vector<float> mass(c.spec.batch * c.spec.num_kv_heads * c.spec.seqlen);
    int64_t begin = 0;
    for (const int64_t end : ends) problem.run(begin, end, choice, mass), begin = end;
    expect_close(mass, expected, c);
  }
}
void expect_whole(const Case& c) {
  expect_chunks(c, {c.spec.seqlen});
}

Case base(int64_t seqlen, int64_t heads, int64_t kv_heads, int64_t dim, int64_t window, int64_t sinks) {
  Case c;
  c.spec.seqlen = seqlen, c.spec.num_heads = heads, c.spec.num_kv_heads = kv_heads, c.spec.head_dim = dim;
  c.spec.window_size = window, c.spec.num_sinks = sinks;
  c.spec.softmax_scale = 1 / std::sqrt(static_cast<double>(dim));
  return c;
}

// The sets sum in different orders, so that their bits tell which of them ran.
TEST(CudaWindowMass, AutomaticChoiceOnHopper) {
  SKIP_WITHOUT_DEVICE();
  if (cuda::compute_capability() != 90) GTEST_SKIP() << "one set of kernels on this device";
  const Case c = base(700, 2, 1, 128, 300, 4);
  const Problem problem(c);
  const auto mass_by = [&](cuda::KernelChoice choice) {
    std::vector<float> mass(c.spec.num_kv_heads * c.spec.seqlen);
    problem.run(0, c.spec.seqlen, choice, mass);
    return mass;
  };
  const std::vector<float> automatic = mass_by(cuda::KernelChoice::kAutomatic);
  EXPECT_EQ(automatic, mass_by(cuda::KernelChoice::kSm90));
  EXPECT_NE(automatic, mass_by(cuda::KernelChoice::kPortable));
}
TEST(CudaWindowMass, Lengths) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t seqlen : {1, 2, 63, 64, 65, 127, 128, 129, 200, 257, 500}) {
    Case c = base(seqlen, 2, 2, seqlen % 2 ? 128 : 64, 100, seqlen % 3 ? 4 : 0);
    c.is_half = seqlen % 4 == 1;
    expect_whole(c);
    if (HasFailure()) return;
  }
}
TEST(CudaWindowMass, Windows) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t window : {1, 2, 3, 31, 64, 65, 127, 128, 300, 699, 701, 2000}) {
    Case c = base(700, 2, 1, 128, window, window % 3);
    c.far = window % 2 == 1;
    expect_whole(c);
    if (HasFailure()) return;
  }
}
TEST(CudaWindowMass, WindowsOfManyBlocks) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t window : {512, 1023, 1024}) {
    Case c = base(1900, 2, window == 512 ? 1 : 2, 128, window, 4);
    c.is_half = window == 1023;
    expect_whole(c);
    expect_chunks(c, {700, 1771, 1900});
    if (HasFailure()) return;
  }
}
TEST(CudaWindowMass, Groups) {
  SKIP_WITHOUT_DEVICE();
  for (const int64_t group : {1, 2, 3, 4, 5, 7, 8, 64}) {
    Case c = base(400, group, 1, group % 2 ? 64 : 128, 90, group % 5);
    c.is_half = group % 3 == 0;
    c.far = group % 4 == 0;
    expect_whole(c);
    if (HasFailure()) return;
  }
  expect_whole(base(300, 6, 3, 64, 50, 2));
}
TEST(CudaWindowMass, BatchAndManySinks) {
  SKIP_WITHOUT_DEVICE();
  Case c = base(500, 2, 2, 64, 40, 150);  // more sinks than a block of far rows
  c.spec.batch = 3;
  expect_whole(c);
  c.far = true;
  expect_whole(c);
}
TEST(CudaWindowMass, Documents) {
  SKIP_WITHOUT_DEVICE();
  Case c = base(1500, 4, 2, 128, 90, 3);
  c.spec.cu_seqlens = {0, 1, 12, 80, 151, 700, 701, 1029, 1500};
  expect_whole(c);
  c.far = true;
  expect_whole(c);
  Case many = base(1500, 1, 1, 64, 8, 2);  // more far rows than a tile looks at in one step
  for (int64_t end = 0; end <= 1500; end += 10) many.spec.cu_seqlens.push_back(end);
  expect_whole(many);
}
// Peaked, and logits that differ by more than the exponent of float32: the tile is done again with a running maximum.
TEST(CudaWindowMass, PeakedSoftmax) {
  SKIP_WITHOUT_DEVICE();
  for (const double deviation : {0.01, 8.0, 40.0}) {
    for (const bool far : {false, true}) {
      Case c = base(600, 2, 1, 128, 200, 4);
      c.deviation = deviation, c.far = far;
      expect_whole(c);
      if (HasFailure()) return;
    }
  }
}
TEST(CudaWindowMass, ScalesThatAreNotPositive) {
  SKIP_WITHOUT_DEVICE();
  for (const double scale : {-0.1, 0.0}) {
    Case c = base(400, 2, 1, 64, 130, 3);
    c.spec.softmax_scale = scale;
    expect_whole(c);
  }
}
TEST(CudaWindowMass, ChunksBehindCarriedRows) {
  SKIP_WITHOUT_DEVICE();
  for (const bool far : {false, true}) {
    for (const int64_t group : {1, 3}) {
      Case c = base(700, 2 * group, 2, 64, 100, 5);
      c.spec.batch = 2, c.far = far;
      expect_chunks(c, {1, 2, 3, 50, 51, 180, 440, 699, 700});
      expect_chunks(c, {300, 700});
      c.spec.head_dim = 128, c.spec.window_size = 333;
      expect_chunks(c, {100, 500, 700});
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace sparsek::test
