// rotary and rotary_table against double loops; relative positions; in place and apart.
#include "kernels/cpu/elementwise/elementwise.h"
#include "tests/kernels/elementwise/elements.h"

namespace sparsek::test {
namespace {

using RotaryTest = EveryIsa;

struct Shape {
  int tokens, heads, head_dim, rotary_dim;
  bool one_angle, in_place;
};

void check_rotary(const Shape& shape, DType dtype, unsigned seed) {
  SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens, " << shape.heads << " heads of " << shape.head_dim
                                    << ", rotary_dim " << shape.rotary_dim << ", one angle " << shape.one_angle
                                    << ", in place " << shape.in_place << ", " << name(dtype) << ", seed " << seed);
  std::mt19937 random(seed);
  const int half = shape.rotary_dim / 2;
  const int64_t x_head = shape.head_dim + 2, x_token = shape.heads * x_head + 6;
  const int64_t out_head = shape.in_place ? x_head : shape.head_dim + 1;
  const int64_t out_token = shape.in_place ? x_token : shape.heads * out_head + 3;
  Elements x(dtype, shape.tokens * x_token), apart(dtype, shape.tokens * out_token);
  x.fill_normal(random);
  const Elements before = x;
  const int angle_rows = shape.one_angle ? 1 : shape.tokens;
  Elements cos(DType::kF32, angle_rows * half), sin(DType::kF32, angle_rows * half);
  std::uniform_real_distribution<double> angle(-4, 4);
  for (int i = 0; i < angle_rows * half; ++i) {
    const double value = angle(random);
    cos.set(i, std::cos(value));
    sin.set(i, std::sin(value));
  }
  Elements& out = shape.in_place ? x : apart;
  cpu::rotary({.dtype = dtype,
               .x = x.data(),
               .out = out.data(),
               .cos = cos.floats(),
               .sin = sin.floats(),
               .x_token_stride = x_token,
               .x_head_stride = x_head,
               .out_token_stride = out_token,
               .out_head_stride = out_head,
               .angle_stride = shape.one_angle ? 0 : half,
               .tokens = shape.tokens,
               .heads = shape.heads,
               .head_dim = shape.head_dim,
               .rotary_dim = shape.rotary_dim});
  for (int token = 0; token < shape.tokens; ++token) {
    for (int head = 0; head < shape.heads; ++head) {
      const int64_t from = token * x_token + head * x_head, to = token * out_token + head * out_head;
      for (int c = 0; c < shape.head_dim; ++c) {
        if (c >= shape.rotary_dim) {
          ASSERT_EQ(out[to + c], before[from + c]);
          continue;
        }
        const int pair = c % half;
        const int64_t at = (shape.one_angle ? 0 : token * half) + pair;
        const double first = before[from + pair], second = before[from + half + pair];
        const double wanted = c < half ? first * cos[at] - second * sin[at] : second * cos[at] + first * sin[at];
        const double magnitude = std::abs(first) + std::abs(second);
        ASSERT_TRUE(is_close(out[to + c], wanted, magnitude, dtype)) << token << ", " << head << ", " << c;
      }
      for (int64_t c = shape.head_dim; c < out_head; ++c) {
        if (shape.in_place) {
          ASSERT_EQ(out[to + c], before[to + c]);
        } else {
          ASSERT_TRUE(std::isnan(out[to + c]));
        }
      }
    }
  }
  EXPECT_TRUE(x.guards_intact() && apart.guards_intact());
}

TEST_P(RotaryTest, EveryShape) {
  unsigned seed = 0;
  for (const DType dtype : kActivationTypes) {
    for (const int head_dim : {8, 16, 40, 64, 128, 256}) {
      for (const bool one_angle : {false, true}) {
        for (const bool in_place : {false, true}) {
          check_rotary({1, 1, head_dim, head_dim, one_angle, in_place}, dtype, ++seed);
          check_rotary({5, 3, head_dim, head_dim, one_angle, in_place}, dtype, ++seed);
          check_rotary({3, 2, head_dim, head_dim / 2, one_angle, in_place}, dtype, ++seed);
        }
      }
    }
    check_rotary({300, 3, 64, 64, false, true}, dtype, ++seed);  // more than one thread
  }
}

TEST(RotaryTable, AnglesAreDouble) {
  // 1,000,003 * 0.7 as float32 is off by up to 0.03.
  const double inv_freq[] = {1.0, 0.7, 1e-5};
  float cos[6], sin[6];
  cpu::rotary_table(1000002, 2, inv_freq, 3, cos, sin, 0.5);
  for (int t = 0; t < 2; ++t) {
    for (int c = 0; c < 3; ++c) {
      const double angle = (1000002.0 + t) * inv_freq[c];
      EXPECT_NEAR(cos[t * 3 + c], 0.5 * std::cos(angle), 3e-8);
      EXPECT_NEAR(sin[t * 3 + c], 0.5 * std::sin(angle), 3e-8);
    }
  }
}

// <R(a) q, R(b) k> depends on a - b only.
TEST_P(RotaryTest, DotProductsAreRelative) {
  std::mt19937 random(3);
  const int head_dim = 64, half = 32;
  std::vector<double> inv_freq(half);
  for (int c = 0; c < half; ++c) inv_freq[c] = std::pow(1e5, -2.0 * c / head_dim);
  Elements q(DType::kF32, head_dim), k(DType::kF32, head_dim);
  q.fill_normal(random);
  k.fill_normal(random);
  const auto dot_at = [&](int64_t q_position, int64_t k_position) {
    Elements rotated_q = q, rotated_k = k;
    for (Elements* x : {&rotated_q, &rotated_k}) {
      std::vector<float> cos(half), sin(half);
      cpu::rotary_table(x == &rotated_q ? q_position : k_position, 1, inv_freq.data(), half, cos.data(), sin.data());
      cpu::rotary({.dtype = DType::kF32,
                   .x = x->data(),
                   .out = x->data(),
                   .cos = cos.data(),
                   .sin = sin.data(),
                   .x_token_stride = head_dim,
                   .x_head_stride = head_dim,
                   .out_token_stride = head_dim,
                   .out_head_stride = head_dim,
                   .angle_stride = half,
                   .tokens = 1,
                   .heads = 1,
                   .head_dim = head_dim,
                   .rotary_dim = head_dim});
    }
    double sum = 0;
    for (int c = 0; c < head_dim; ++c) sum += rotated_q[c] * rotated_k[c];
    return sum;
  };
  EXPECT_NEAR(dot_at(700, 300), dot_at(1000700, 1000300), 1e-5);
  EXPECT_GT(std::abs(dot_at(700, 300) - dot_at(701, 300)), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Isas, RotaryTest, all_isas(), isa_name);

}  // namespace
}  // namespace sparsek::test
