// The kernels between matrix products against double loops, by row, to the half types' rounding, with strides, odd
// sizes and what must not be written.
#include "kernels/cuda/elementwise/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <stdexcept>

#include "base/bf16.h"
#include "tests/kernels/cuda/device.h"

namespace sparsek::test {
namespace {

constexpr double kRounding = 1.0 / 256;  // relative: half of bfloat16's last place, and float32's errors before it

std::vector<float> normal(int64_t count, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

std::vector<BFloat16> rounded(const std::vector<float>& values) {
  std::vector<BFloat16> bf16;
  for (const float value : values) bf16.push_back(to_bf16(value));
  return bf16;
}

// Written so that NaN fails.
void expect_close(BFloat16 found, double wanted, double size, const char* what, int64_t at) {
  EXPECT_TRUE(std::abs(double{to_float(found)} - wanted) <= kRounding * size)
      << what << " at " << at << ": " << to_float(found) << " for " << wanted;
}

// The norm of a row's error against `size`, the norm of what its elements are sums of: late rows of a gradient are
// small, and elements cancel.
void expect_row_close(const float* found, const double* wanted, int count, double size, double limit, const char* what,
                      int64_t row) {
  double error = 0;
  for (int i = 0; i < count; ++i) error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
  EXPECT_TRUE(std::sqrt(error) <= limit * size)
      << what << " of row " << row << ": off by " << std::sqrt(error) << " of " << size;
}

std::vector<float> widened(const std::vector<BFloat16>& values) {
  std::vector<float> wide;
  for (const BFloat16 value : values) wide.push_back(to_float(value));
  return wide;
}

TEST(CudaElementwise, RmsNorm) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, dim] :
       {std::pair<int64_t, int>{1, 1}, {3, 576}, {70, 257}, {2, 8192}, {3, 12288}, {1, 2050}, {0, 64}, {9, 1024}}) {
    for (const bool has_update : {false, true}) {
      const int64_t x_stride = dim + (dim % 4 == 0 ? 4 : 3), out_stride = dim + 8;
      const std::vector<float> x = normal(rows * x_stride, 1), weight = normal(dim, 2);
      const std::vector<BFloat16> update = rounded(normal(rows * dim, 3));
      const DeviceArray<float> device_x(x), device_weight(weight), sum(rows * dim), rstd(rows);
      const DeviceArray<BFloat16> device_update(update), out(rows * out_stride);
      cuda::rms_norm({.x = device_x.data(),
                      .update = has_update ? device_update.data() : nullptr,
                      .weight = device_weight.data(),
                      .out = out.data(),
                      .sum = has_update ? sum.data() : nullptr,
                      .rstd = rstd.data(),
                      .x_stride = x_stride,
                      .out_stride = out_stride,
                      .rows = rows,
                      .dim = dim,
                      .eps = 1e-5f},
                     nullptr);
      const std::vector<BFloat16> found = out.to_vector();
      const std::vector<float> sums = sum.to_vector(), scales = rstd.to_vector();
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> wanted(dim);
        double squares = 0;
        for (int i = 0; i < dim; ++i) {
          wanted[i] = double{x[r * x_stride + i]} + (has_update ? to_float(update[r * dim + i]) : 0.0f);
          if (has_update) {
            EXPECT_TRUE(std::abs(sums[r * dim + i] - wanted[i]) <= 1e-6 * (std::abs(wanted[i]) + 1));
          }
          squares += wanted[i] * wanted[i];
        }
        const double scale = 1 / std::sqrt(squares / dim + 1e-5);
        EXPECT_TRUE(std::abs(scales[r] - scale) <= 1e-5 * scale) << "rstd of row " << r;
        for (int i = 0; i < dim; ++i) {
          const double value = wanted[i] * scale * weight[i];
          expect_close(found[r * out_stride + i], value, std::abs(value) + 1e-6, "rms_norm", r * out_stride + i);
        }
        for (int64_t i = dim; i < out_stride; ++i) {
          EXPECT_EQ(found[r * out_stride + i].bits, 0xffff) << "beyond the row";
        }
      }
    }
  }
}

TEST(CudaElementwise, RmsNormRefusesWhatNoTeamHolds) {
  SKIP_WITHOUT_DEVICE();
  EXPECT_THROW(cuda::rms_norm({.x_stride = 20000, .out_stride = 20000, .rows = 1, .dim = 20000}, nullptr),
               std::invalid_argument);
}

// More rows than teams at once (2 blocks a multiprocessor), so that sums over rows go through every stage.
TEST(CudaElementwise, RmsNormBackward) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, dim] :
       {std::pair<int64_t, int>{1, 1}, {5000, 576}, {700, 257}, {40, 8192}, {3, 12288}, {700, 2000}, {0, 64}}) {
    for (const bool is_inner : {false, true}) {  // with an update and a gradient of the sum, or neither
      const std::vector<float> sum = normal(rows * dim, 1), weight = normal(dim, 2), dsum = normal(rows * dim, 3);
      const std::vector<BFloat16> dout = rounded(normal(rows * dim, 4));
      std::vector<float> rstd(rows);
      std::vector<double> dx(rows * dim), dx_size(rows), dweight(dim), dweight_size(dim);
      for (int64_t r = 0; r < rows; ++r) {
        const float* x = sum.data() + r * dim;
        double squares = 0, mean = 0;
        for (int i = 0; i < dim; ++i) squares += double{x[i]} * x[i];
        const double scale = 1 / std::sqrt(squares / dim + 1e-5);
        rstd[r] = static_cast<float>(scale);
        for (int i = 0; i < dim; ++i) mean += double{to_float(dout[r * dim + i])} * weight[i] * x[i] * scale / dim;
        for (int i = 0; i < dim; ++i) {
          const double d = to_float(dout[r * dim + i]), y = x[i] * scale;
          dx[r * dim + i] = (is_inner ? dsum[r * dim + i] : 0) + scale * (d * weight[i] - y * mean);
          dx_size[r] += std::pow(std::abs(dx[r * dim + i]) + scale * (std::abs(d * weight[i]) + std::abs(y * mean)), 2);
          dweight[i] += d * y;
          dweight_size[i] += std::abs(d * y);
        }
        dx_size[r] = std::sqrt(dx_size[r]);
      }
      const DeviceArray<float> device_sum(sum), device_rstd(rstd), device_weight(weight), device_dsum(dsum);
      const DeviceArray<BFloat16> device_dout(dout);
      std::vector<std::vector<float>> runs;
      for (int run = 0; run < 2; ++run) {
        const DeviceArray<float> found_dx(rows * dim), found_dweight(dim);
        const DeviceArray<BFloat16> found_dupdate(rows * dim);
        const cuda::RmsNormBwdParams params{.dout = device_dout.data(),
                                            .dsum = is_inner ? device_dsum.data() : nullptr,
                                            .sum = device_sum.data(),
                                            .rstd = device_rstd.data(),
                                            .weight = device_weight.data(),
                                            .dx = found_dx.data(),
                                            .dupdate = is_inner ? found_dupdate.data() : nullptr,
                                            .dweight = found_dweight.data(),
                                            .rows = rows,
                                            .dim = dim};
        const DeviceArray<uint8_t> workspace(cuda::rms_norm_backward_workspace_bytes(params));
        cuda::rms_norm_backward(params, workspace.data(), nullptr);
        const std::vector<float> got_dx = found_dx.to_vector(), got_dweight = found_dweight.to_vector();
        const std::vector<float> got_dupdate = widened(found_dupdate.to_vector());
        for (int64_t r = 0; r < rows; ++r) {
          expect_row_close(got_dx.data() + r * dim, dx.data() + r * dim, dim, dx_size[r], 1e-5, "dx", r);
          if (is_inner)
            expect_row_close(got_dupdate.data() + r * dim, dx.data() + r * dim, dim, dx_size[r], kRounding, "dupdate",
                             r);
        }
        for (int i = 0; i < dim; ++i) {
          EXPECT_TRUE(std::abs(got_dweight[i] - dweight[i]) <= 1e-5 * dweight_size[i] + 1e-30) << "dweight at " << i;
        }
        runs.push_back(got_dweight);
        runs.push_back(got_dx);
      }
      EXPECT_EQ(runs[0], runs[2]) << "dweight, bits of two runs";
      EXPECT_EQ(runs[1], runs[3]) << "dx, bits of two runs";
    }
  }
}

// All that a launch can do: parts with other numbers of heads, one of two sources, one that is copied, batches whose
// angles are their own or shared, one row of angles for every token, back as well as forth, in place.
TEST(CudaElementwise, Rotary) {
  SKIP_WITHOUT_DEVICE();
  struct Case {
    int64_t batch, tokens;
    int head_dim;
    bool own_angles, is_inverse;
    int64_t gap;
  };
  for (const Case& c : {Case{1, 1, 64, false, false, 8}, Case{2, 37, 128, true, true, 8},
                        Case{3, 5, 10, true, false, 3}, Case{1, 100, 64, false, true, 0}}) {
    const int half = c.head_dim / 2, heads = 3;
    const int64_t token_stride = heads * c.head_dim + c.gap, batch_stride = c.tokens * token_stride;
    const std::vector<BFloat16> x = rounded(normal(c.batch * batch_stride, 3)),
                                y = rounded(normal(c.batch * batch_stride, 4));
    const int64_t angle_rows = (c.own_angles ? c.batch : 1) * c.tokens;
    const std::vector<float> cos = normal(angle_rows * half, 5), sin = normal(angle_rows * half, 6);
    const std::vector<float> far_cos = normal(half, 7), far_sin = normal(half, 8);
    const DeviceArray<BFloat16> device_x(x), device_y(y), in_place(x), copied(c.batch * batch_stride),
        both(c.batch * batch_stride);
    const DeviceArray<float> device_cos(cos), device_sin(sin), device_far_cos(far_cos), device_far_sin(far_sin);
    const auto from = [&](const BFloat16* at) {
      return cuda::Rotation{.x = at,
                            .cos = device_cos.data(),
                            .sin = device_sin.data(),
                            .x_batch_stride = batch_stride,
                            .x_token_stride = token_stride,
                            .x_head_stride = c.head_dim,
                            .angle_batch_stride = c.own_angles ? c.tokens * half : 0,
                            .angle_token_stride = half,
                            .is_inverse = c.is_inverse};
    };
    cuda::Rotation plain = from(device_x.data()), far = from(device_y.data());
    plain.cos = plain.sin = nullptr;
    far.cos = device_far_cos.data();
    far.sin = device_far_sin.data();
    far.angle_batch_stride = far.angle_token_stride = 0;
    const auto part = [&](const cuda::Rotation& first, const cuda::Rotation& second, BFloat16* out, int count) {
      return cuda::RotaryPart{.first = first,
                              .second = second,
                              .out = out,
                              .out_batch_stride = batch_stride,
                              .out_token_stride = token_stride,
                              .out_head_stride = c.head_dim,
                              .heads = count};
    };
    cuda::RotaryParams params{.num_parts = 3, .head_dim = c.head_dim, .batch = c.batch, .tokens = c.tokens};
    params.parts[0] = part(from(in_place.data()), {}, in_place.data(), heads);
    params.parts[1] = part(plain, {}, copied.data(), 1);
    params.parts[2] = part(from(device_x.data()), far, both.data(), 2);
    cuda::rotary(params, nullptr);
    const std::vector<BFloat16> found[] = {in_place.to_vector(), copied.to_vector(), both.to_vector()};
    const double sign = c.is_inverse ? -1 : 1;
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        const int64_t token = b * batch_stride + t * token_stride;
        const int64_t angle = ((c.own_angles ? b * c.tokens : 0) + t) * half;
        for (int h = 0; h < heads; ++h) {
          for (int i = 0; i < c.head_dim; ++i) {
            const int64_t at = token + h * c.head_dim + i, pair = i < half ? at + half : at - half;
            const int a = i % half;
            const double turn = (i < half ? -1 : 1) * sign;
            const double near = to_float(x[at]) * double{cos[angle + a]},
                         other = turn * to_float(x[pair]) * sin[angle + a];
            const double far_near = to_float(y[at]) * double{far_cos[a]},
                         far_other = turn * to_float(y[pair]) * far_sin[a];
            expect_close(found[0][at], near + other, std::abs(near) + std::abs(other), "rotary in place", at);
            if (h < 1) {
              EXPECT_EQ(found[1][at].bits, x[at].bits) << "copied at " << at;
            }
            if (h < 2) {
              expect_close(found[2][at], near + other + far_near + far_other,
                           std::abs(near) + std::abs(other) + std::abs(far_near) + std::abs(far_other), "rotary of two",
                           at);
            }
            if (h >= 1) {
              EXPECT_EQ(found[1][at].bits, 0xffff);
            }
            if (h >= 2) {
              EXPECT_EQ(found[2][at].bits, 0xffff);
            }
          }
        }
        for (int64_t i = token + heads * c.head_dim; i < token + token_stride; ++i) {
          EXPECT_EQ(found[0][i].bits, x[i].bits) << "between tokens";
        }
      }
    }
  }
}

TEST(CudaElementwise, Swiglu) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, ffn] : {std::pair<int64_t, int>{1, 1536}, {33, 7}, {0, 5}, {70, 24}}) {
    std::vector<float> values = normal(rows * 2 * ffn, 6);
    if (rows > 0) values[0] = -100, values[1] = 100;
    const std::vector<BFloat16> gate_up = rounded(values);
    const DeviceArray<BFloat16> in_place(gate_up), apart(rows * ffn), source(gate_up);
    for (const bool is_in_place : {true, false}) {
      const DeviceArray<BFloat16>& from = is_in_place ? in_place : source;
      cuda::swiglu({.gate = from.data(),
                    .up = from.data() + ffn,
                    .out = is_in_place ? in_place.data() : apart.data(),
                    .gate_stride = 2 * ffn,
                    .up_stride = 2 * ffn,
                    .out_stride = is_in_place ? 2 * ffn : ffn,
                    .rows = rows,
                    .ffn = ffn},
                   nullptr);
    }
    const std::vector<BFloat16> found = in_place.to_vector(), found_apart = apart.to_vector();
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < ffn; ++i) {
        const int64_t at = r * 2 * ffn + i;
        const double gate = to_float(gate_up[at]), up = to_float(gate_up[at + ffn]);
        const double wanted = gate / (1 + std::exp(-gate)) * up;
        expect_close(found[at], wanted, std::abs(wanted) + 1e-30, "swiglu", at);
        EXPECT_EQ(found_apart[r * ffn + i].bits, found[at].bits);
        EXPECT_EQ(found[at + ffn].bits, gate_up[at + ffn].bits);
      }
    }
  }
}

TEST(CudaElementwise, SwigluBackward) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, ffn] : {std::pair<int64_t, int>{1, 1536}, {33, 7}, {0, 5}, {70, 24}}) {
    std::vector<float> values = normal(rows * 2 * ffn, 6);
    if (rows > 0) values[0] = -100, values[1] = 100;
    const std::vector<BFloat16> gate_up = rounded(values), dout = rounded(normal(rows * ffn, 7));
    const DeviceArray<BFloat16> device_gate_up(gate_up), device_dout(dout), dgate_up(rows * 2 * ffn);
    cuda::swiglu_backward({.dout = device_dout.data(),
                           .gate_up = device_gate_up.data(),
                           .dgate_up = dgate_up.data(),
                           .rows = rows,
                           .ffn = ffn},
                          nullptr);
    const std::vector<BFloat16> found = dgate_up.to_vector();
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < ffn; ++i) {
        const int64_t at = r * 2 * ffn + i;
        const double g = to_float(gate_up[at]), up = to_float(gate_up[at + ffn]), d = to_float(dout[r * ffn + i]);
        const double s = 1 / (1 + std::exp(-g));
        // 1 + g (1 - s) cancels near its root.
        expect_close(found[at], d * up * s * (1 + g * (1 - s)),
                     std::abs(d * up) * s * (1 + std::abs(g * (1 - s))) + 1e-30, "dgate", at);
        expect_close(found[at + ffn], d * g * s, std::abs(d * g * s) + 1e-30, "dup", at);
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::test
