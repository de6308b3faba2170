// rms_norm and head_norm against double loops.
#include "kernels/cpu/elementwise/elementwise.h"
#include "tests/kernels/elementwise/elements.h"

namespace sparsek::test {
namespace {

using NormTest = EveryIsa;

struct Shape {
  int rows, dim;
};
constexpr Shape kShapes[] = {{1, 1}, {3, 7}, {5, 16}, {2, 64}, {3, 65}, {4, 576}, {1, 2048}, {130, 577}};

void check_rms_norm(Shape shape, DType y_dtype, DType out_dtype, bool with_y, bool with_out, unsigned seed) {
  SCOPED_TRACE(::testing::Message() << shape.rows << " x " << shape.dim << ", y " << (with_y ? name(y_dtype) : "none")
                                    << ", out " << (with_out ? name(out_dtype) : "none") << ", seed " << seed);
  std::mt19937 random(seed);
  const int64_t x_stride = shape.dim + 3, y_stride = shape.dim + 5, out_stride = shape.dim + 1;
  Elements x(DType::kF32, shape.rows * x_stride), y(y_dtype, shape.rows * y_stride);
  Elements weight(DType::kF32, shape.dim), out(out_dtype, shape.rows * out_stride);
  x.fill_normal(random, 3);
  y.fill_normal(random);
  weight.fill_normal(random);
  const Elements before = x;

  cpu::RmsNormParams params;
  params.y_dtype = y_dtype;
  params.out_dtype = out_dtype;
  params.x = x.floats();
  params.y = with_y ? y.data() : nullptr;
  params.weight = weight.floats();
  params.out = with_out ? out.data() : nullptr;
  params.x_stride = x_stride;
  params.y_stride = y_stride;
  params.out_stride = out_stride;
  params.rows = shape.rows;
  params.dim = shape.dim;
  params.eps = 1e-3f;
  cpu::rms_norm(params);

  for (int row = 0; row < shape.rows; ++row) {
    double sum = 0;
    for (int c = 0; c < shape.dim; ++c) {
      const int64_t at = row * x_stride + c;
      const double wanted = static_cast<float>(before[at] + (with_y ? y[row * y_stride + c] : 0.0));
      ASSERT_EQ(x[at], wanted) << "row " << row << " channel " << c;
      sum += wanted * wanted;
    }
    for (int64_t c = shape.dim; c < x_stride; ++c) ASSERT_EQ(x[row * x_stride + c], before[row * x_stride + c]);
    const double factor = 1 / std::sqrt(sum / shape.dim + 1e-3f);
    for (int c = 0; c < out_stride; ++c) {
      const double got = out[row * out_stride + c];
      if (!with_out || c >= shape.dim) {
        ASSERT_TRUE(std::isnan(got)) << "written outside the row";
        continue;
      }
      const double wanted = x[row * x_stride + c] * factor * weight[c];
      ASSERT_TRUE(is_close(got, wanted, std::abs(wanted), out_dtype))
          << row << ", " << c << ": " << got << " " << wanted;
    }
  }
  EXPECT_TRUE(x.guards_intact() && out.guards_intact());
}

TEST_P(NormTest, RmsNorm) {
  unsigned seed = 100;
  for (const Shape shape : kShapes) {
    for (const DType y_dtype : kActivationTypes) {
      for (const DType out_dtype : kActivationTypes) {
        check_rms_norm(shape, y_dtype, out_dtype, true, true, ++seed);
        check_rms_norm(shape, y_dtype, out_dtype, false, true, ++seed);
      }
      check_rms_norm(shape, y_dtype, DType::kF32, true, false, ++seed);
    }
  }
}

TEST_P(NormTest, RmsNormInPlace) {
  std::mt19937 random(7);
  Elements x(DType::kF32, 33), weight(DType::kF32, 33);
  x.fill_normal(random);
  weight.fill_normal(random);
  const Elements before = x;
  cpu::rms_norm({.out_dtype = DType::kF32,
                 .x = x.floats(),
                 .weight = weight.floats(),
                 .out = x.data(),
                 .x_stride = 33,
                 .out_stride = 33,
                 .rows = 1,
                 .dim = 33,
                 .eps = 1e-6f});
  double sum = 0;
  for (int c = 0; c < 33; ++c) sum += before[c] * before[c];
  for (int c = 0; c < 33; ++c) {
    const double wanted = before[c] / std::sqrt(sum / 33 + 1e-6) * weight[c];
    EXPECT_TRUE(is_close(x[c], wanted, std::abs(wanted), DType::kF32)) << c;
  }
}

TEST_P(NormTest, ANaNStaysInItsRow) {
  Elements x(DType::kF32, 2 * 40), weight(DType::kF32, 40), out(DType::kBF16, 2 * 40);
  for (int i = 0; i < 80; ++i) x.set(i, i == 39 ? std::nan("") : 1 + i);
  for (int c = 0; c < 40; ++c) weight.set(c, 1);
  cpu::rms_norm({.x = x.floats(),
                 .weight = weight.floats(),
                 .out = out.data(),
                 .x_stride = 40,
                 .out_stride = 40,
                 .rows = 2,
                 .dim = 40,
                 .eps = 1e-6f});
  for (int c = 0; c < 40; ++c) {
    EXPECT_TRUE(std::isnan(out[c]));
    EXPECT_TRUE(std::isfinite(out[40 + c]));
  }
}

TEST_P(NormTest, HeadNorm) {
  for (const DType dtype : kActivationTypes) {
    for (const int head_dim : {8, 20, 64, 128, 256}) {
      for (const int tokens : {0, 1, 3, 90}) {
        SCOPED_TRACE(::testing::Message() << name(dtype) << " head_dim " << head_dim << " tokens " << tokens);
        std::mt19937 random(head_dim + tokens);
        const int heads = 3;
        const int64_t head_stride = head_dim + 4, token_stride = heads * head_stride + 9;
        Elements x(dtype, tokens * token_stride), weight(DType::kF32, head_dim);
        x.fill_normal(random, 2);
        weight.fill_normal(random);
        const Elements before = x;
        cpu::head_norm({.dtype = dtype,
                        .x = x.data(),
                        .weight = weight.floats(),
                        .token_stride = token_stride,
                        .head_stride = head_stride,
                        .tokens = tokens,
                        .heads = heads,
                        .head_dim = head_dim,
                        .eps = 1e-2f});
        for (int token = 0; token < tokens; ++token) {
          for (int head = 0; head < heads; ++head) {
            const int64_t at = token * token_stride + head * head_stride;
            double sum = 0;
            for (int c = 0; c < head_dim; ++c) sum += before[at + c] * before[at + c];
            for (int c = 0; c < head_dim; ++c) {
              const double value = before[at + c] / std::sqrt(sum / head_dim + 1e-2f) * weight[c];
              ASSERT_TRUE(is_close(x[at + c], value, std::abs(value), dtype)) << token << ", " << head << ", " << c;
              x.set(at + c, before[at + c]);
            }
          }
        }
        for (int64_t i = 0; i < x.count(); ++i) ASSERT_EQ(x[i], before[i]) << "written between the heads";
        EXPECT_TRUE(x.guards_intact());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, NormTest, all_isas(), isa_name);

}  // namespace
}  // namespace sparsek::test
