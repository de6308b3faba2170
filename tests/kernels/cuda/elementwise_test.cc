// rms_norm, rotary and swiglu on the GPU against double precision, to bfloat16's rounding, with strides and odd sizes.
#include "kernels/cuda/elementwise/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

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

TEST(CudaElementwise, RmsNorm) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, dim] : {std::pair<int64_t, int>{1, 1}, {3, 576}, {70, 257}, {2, 8192}, {0, 64}}) {
    const int64_t x_stride = dim + 3, out_stride = dim + 8;
    const std::vector<float> x = normal(rows * x_stride, 1), weight = normal(dim, 2);
    const DeviceArray<float> device_x(x), device_weight(weight);
    const DeviceArray<BFloat16> out(rows * out_stride);
    cuda::rms_norm({.x = device_x.data(),
                    .weight = device_weight.data(),
                    .out = out.data(),
                    .x_stride = x_stride,
                    .out_stride = out_stride,
                    .rows = rows,
                    .dim = dim,
                    .eps = 1e-5f},
                   nullptr);
    const std::vector<BFloat16> found = out.to_vector();
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0;
      for (int i = 0; i < dim; ++i) squares += double{x[r * x_stride + i]} * x[r * x_stride + i];
      for (int i = 0; i < dim; ++i) {
        const double wanted = x[r * x_stride + i] / std::sqrt(squares / dim + 1e-5) * weight[i];
        expect_close(found[r * out_stride + i], wanted, std::abs(wanted), "rms_norm", r * out_stride + i);
      }
      for (int64_t i = dim; i < out_stride; ++i) EXPECT_EQ(found[r * out_stride + i].bits, 0xffff) << "beyond the row";
    }
  }
}

TEST(CudaElementwise, Rotary) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [tokens, heads, head_dim, one_row] :
       {std::tuple<int64_t, int, int, bool>{1, 9, 64, false}, {37, 3, 128, false}, {5, 2, 10, true}}) {
    for (const bool in_place : {false, true}) {
      const int64_t token_stride = heads * head_dim + 6, angles = one_row ? 1 : tokens;
      const std::vector<BFloat16> x = rounded(normal(tokens * token_stride, 3));
      const std::vector<float> cos = normal(angles * head_dim, 4), sin = normal(angles * head_dim, 5);
      const DeviceArray<BFloat16> device_x(x), apart(tokens * token_stride);
      const DeviceArray<BFloat16>& out = in_place ? device_x : apart;
      const DeviceArray<float> device_cos(cos), device_sin(sin);
      cuda::rotary({.x = device_x.data(),
                    .out = out.data(),
                    .cos = device_cos.data(),
                    .sin = device_sin.data(),
                    .x_token_stride = token_stride,
                    .x_head_stride = head_dim,
                    .out_token_stride = token_stride,
                    .out_head_stride = head_dim,
                    .angle_stride = one_row ? 0 : head_dim,
                    .tokens = tokens,
                    .heads = heads,
                    .head_dim = head_dim},
                   nullptr);
      const std::vector<BFloat16> found = out.to_vector();
      for (int64_t t = 0; t < tokens; ++t) {
        for (int h = 0; h < heads; ++h) {
          for (int c = 0; c < head_dim; ++c) {
            const int64_t row = t * token_stride + h * head_dim, angle = (one_row ? 0 : t) * head_dim + c;
            const int pair = c < head_dim / 2 ? c + head_dim / 2 : c - head_dim / 2;
            const double own = double{to_float(x[row + c])} * cos[angle];
            const double other = double{to_float(x[row + pair])} * sin[angle];
            expect_close(found[row + c], own + other, std::abs(own) + std::abs(other), "rotary", row + c);
          }
        }
        for (int64_t i = heads * head_dim; i < token_stride; ++i) {
          EXPECT_EQ(found[t * token_stride + i].bits, in_place ? x[t * token_stride + i].bits : 0xffff);
        }
      }
    }
  }
}

TEST(CudaElementwise, Swiglu) {
  SKIP_WITHOUT_DEVICE();
  for (const auto& [rows, ffn] : {std::pair<int64_t, int>{1, 1536}, {33, 7}, {0, 5}}) {
    std::vector<float> values = normal(rows * 2 * ffn, 6);
    if (rows > 0) values[0] = -100, values[1] = 100;
    const std::vector<BFloat16> gate_up = rounded(values);
    const DeviceArray<BFloat16> device(gate_up);
    cuda::swiglu({.gate = device.data(),
                  .up = device.data() + ffn,
                  .gate_stride = 2 * ffn,
                  .up_stride = 2 * ffn,
                  .rows = rows,
                  .ffn = ffn},
                 nullptr);
    const std::vector<BFloat16> found = device.to_vector();
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < ffn; ++i) {
        const int64_t at = r * 2 * ffn + i;
        const double gate = to_float(gate_up[at]), up = to_float(gate_up[at + ffn]);
        const double wanted = gate / (1 + std::exp(-gate)) * up;
        expect_close(found[at], wanted, std::abs(wanted) + 1e-30, "swiglu", at);
        EXPECT_EQ(found[at + ffn].bits, gate_up[at + ffn].bits);
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::test
