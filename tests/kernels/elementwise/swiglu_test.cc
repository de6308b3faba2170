// swiglu against double loops, over the whole range of float32.
#include "kernels/cpu/elementwise/elementwise.h"
#include "tests/kernels/elementwise/elements.h"

namespace sparsek::test {
namespace {

using SwigluTest = EveryIsa;

double reference(double gate, double up) {
  return gate / (1 + std::exp(-gate)) * up;
}

TEST_P(SwigluTest, OneBufferOrTwo) {
  for (const DType dtype : kActivationTypes) {
    for (const int ffn : {1, 15, 16, 33, 1536}) {
      for (const int rows : {0, 1, 3, 40}) {
        for (const bool in_place : {false, true}) {
          SCOPED_TRACE(::testing::Message() << name(dtype) << " " << rows << " x " << ffn << " in place " << in_place);
          std::mt19937 random(rows * 10000 + ffn);
          const int64_t stride = 2 * ffn;
          Elements both(dtype, rows * stride), apart(dtype, rows * (ffn + 3));
          both.fill_normal(random, 4);
          const Elements before = both;
          char* data = static_cast<char*>(both.data());
          const int64_t out_stride = in_place ? stride : ffn + 3;
          cpu::swiglu({.dtype = dtype,
                       .gate = data,
                       .up = data + ffn * size_in_bytes(dtype),
                       .out = in_place ? data : apart.data(),
                       .gate_stride = stride,
                       .up_stride = stride,
                       .out_stride = out_stride,
                       .rows = rows,
                       .ffn = ffn});
          const Elements& out = in_place ? both : apart;
          for (int row = 0; row < rows; ++row) {
            for (int c = 0; c < ffn; ++c) {
              const double wanted = reference(before[row * stride + c], before[row * stride + ffn + c]);
              ASSERT_TRUE(is_close(out[row * out_stride + c], wanted, std::abs(wanted), dtype)) << row << ", " << c;
            }
            for (int64_t c = ffn; c < out_stride; ++c) {
              const double rest = out[row * out_stride + c];
              ASSERT_TRUE(in_place ? rest == before[row * stride + c] : std::isnan(rest)) << "outside the row";
            }
          }
          EXPECT_TRUE(both.guards_intact() && apart.guards_intact());
        }
      }
    }
  }
}

TEST_P(SwigluTest, ExtremeGates) {
  const double gates[] = {0, -0.0, 1e-30, 20, 87.5, 88.5, 100, 1e30, -20, -80, -87.5, -100, -1e30, std::nan("")};
  const int count = std::size(gates);
  Elements gate(DType::kF32, count), up(DType::kF32, count), out(DType::kF32, count);
  for (int i = 0; i < count; ++i) {
    gate.set(i, gates[i]);
    up.set(i, 1.5);
  }
  cpu::swiglu({.dtype = DType::kF32,
               .gate = gate.data(),
               .up = up.data(),
               .out = out.data(),
               .gate_stride = count,
               .up_stride = count,
               .out_stride = count,
               .rows = 1,
               .ffn = count});
  for (int i = 0; i < count; ++i) {
    if (std::isnan(gates[i])) {
      EXPECT_TRUE(std::isnan(out[i]));
    } else if (gates[i] < -87) {  // the value is below float32's normal range relative to the gate
      EXPECT_NEAR(out[i] / gates[i], 0, 1e-37) << gates[i];
    } else {
      const double wanted = reference(gate[i], 1.5);
      EXPECT_TRUE(is_close(out[i], wanted, std::abs(wanted), DType::kF32)) << gates[i] << ": " << out[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, SwigluTest, all_isas(), isa_name);

}  // namespace
}  // namespace sparsek::test
