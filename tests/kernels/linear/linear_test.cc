// Products with packed weights against plain double loops over the unpacked blocks, element by element. The limit of an
// element is a few float32 roundings of the sum of its absolute products, so a wrong nibble, scale or row cannot hide.
#include "kernels/cpu/linear/linear.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr WeightType kTypes[] = {WeightType::kF32, WeightType::kBF16, WeightType::kQ4_1, WeightType::kQ8_0};

std::vector<Isa> isas() {
  std::vector<Isa> result;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (static_cast<int>(isa) <= static_cast<int>(best_isa())) result.push_back(isa);
  }
  return result;
}

class LinearTest : public ::testing::Test {
 protected:
  void TearDown() override { force_isa(best_isa()); }
};

// A weight as GGUF blocks and packed from them.
struct Weight {
  WeightType type;
  int64_t out, in;
  std::vector<uint8_t> blocks;
  std::unique_ptr<uint8_t, void (*)(void*)> data{nullptr, std::free};
  std::vector<float> values;      // [out][in]
  std::vector<float> rounded;     // [out][in] values as bfloat16
  std::vector<double> magnitude;  // [out][in] what roundings are relative to: the parts that a value is summed from
  PackedWeight packed() const { return {type, out, in, data.get()}; }
  int64_t row_bytes() const { return in / layout(type).block_elements * layout(type).block_bytes; }
};

uint16_t random_half(std::mt19937& rng, bool allow_negative) {
  const uint32_t sign = allow_negative ? rng() & 0x8000u : 0;
  return static_cast<uint16_t>(sign | (rng() % 0x800u + 0x2000u));  // 2^-7 .. 2^-5
}

Weight make_weight(WeightType type, int64_t out, int64_t in, std::mt19937& rng) {
  Weight weight;
  weight.type = type;
  weight.out = out;
  weight.in = in;
  weight.blocks.resize(static_cast<size_t>(out * weight.row_bytes()));
  std::normal_distribution<float> normal(0.0f, 0.1f);
  const int bytes = layout(type).block_bytes;
  for (size_t at = 0; at < weight.blocks.size(); at += static_cast<size_t>(bytes)) {
    uint8_t* block = &weight.blocks[at];
    for (int i = 0; i < bytes; ++i) block[i] = static_cast<uint8_t>(rng());
    const float value = normal(rng);
    const BFloat16 rounded = to_bf16(value);
    const uint16_t d = random_half(rng, true), m = random_half(rng, true);
    if (type == WeightType::kF32) std::memcpy(block, &value, 4);
    if (type == WeightType::kBF16) std::memcpy(block, &rounded, 2);
    if (type == WeightType::kQ4_1 || type == WeightType::kQ8_0) std::memcpy(block, &d, 2);
    if (type == WeightType::kQ4_1) std::memcpy(block + 2, &m, 2);
  }
  weight.values.resize(static_cast<size_t>(out * in));
  dequantise(type, weight.blocks.data(), out * in, weight.values.data());
  for (float value : weight.values) weight.rounded.push_back(to_float(to_bf16(value)));
  weight.magnitude.resize(weight.values.size());
  for (size_t i = 0; i < weight.values.size(); ++i) {
    uint16_t d = 0, m = 0;
    const uint8_t* block =
        &weight.blocks[i / static_cast<size_t>(layout(type).block_elements) * static_cast<size_t>(bytes)];
    std::memcpy(&d, block, 2);
    if (type == WeightType::kQ4_1) std::memcpy(&m, block + 2, 2);
    weight.magnitude[i] = std::fabs(weight.values[i]);
    if (type == WeightType::kQ4_1) weight.magnitude[i] += 2 * std::fabs(half_to_float(m));
    if (type == WeightType::kQ8_0) weight.magnitude[i] += 30 * std::fabs(half_to_float(d));
  }
  const size_t size = packed_size_bytes(type, out, in);
  weight.data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64)));
  std::memset(weight.data.get(), 0xff, size);
  return weight;
}

void pack(Weight& weight, int64_t begin, int64_t count) {
  pack_rows(weight.type, weight.out, weight.in, begin, count,
            &weight.blocks[static_cast<size_t>(begin * weight.row_bytes())], weight.data.get());
}

struct Case {
  int64_t rows;
  DType x_dtype, y_dtype;
  bool with_bias, add_to_y;
};

std::string describe(Isa isa, const Weight& weight, const Case& c) {
  return std::string(name(isa)) + " " + name(weight.type) + " " + std::to_string(weight.out) + "x" +
         std::to_string(weight.in) + " rows " + std::to_string(c.rows) + " x " + name(c.x_dtype) + " y " +
         name(c.y_dtype) + (c.with_bias ? " bias" : "") + (c.add_to_y ? " add" : "");
}

// x and y as bytes with margins: NaN behind every row of x and everywhere in a y that is not added to.
struct Buffers {
  std::vector<uint8_t> x, y;
  std::vector<float> x_values, y_before, bias;
  int64_t x_stride, y_stride;
};
void put(std::vector<uint8_t>& bytes, DType dtype, int64_t i, float value) {
  const BFloat16 rounded = to_bf16(value);
  if (dtype == DType::kF32) std::memcpy(&bytes[static_cast<size_t>(i) * 4], &value, 4);
  if (dtype == DType::kBF16) std::memcpy(&bytes[static_cast<size_t>(i) * 2], &rounded, 2);
}
float get(const std::vector<uint8_t>& bytes, DType dtype, int64_t i) {
  float value = 0;
  BFloat16 half{};
  if (dtype == DType::kF32) std::memcpy(&value, &bytes[static_cast<size_t>(i) * 4], 4);
  if (dtype == DType::kBF16) std::memcpy(&half, &bytes[static_cast<size_t>(i) * 2], 2);
  return dtype == DType::kF32 ? value : to_float(half);
}

Buffers make_buffers(const Weight& weight, const Case& c, std::mt19937& rng) {
  Buffers b;
  std::normal_distribution<float> normal;
  b.x_stride = weight.in + 3;
  b.y_stride = weight.out + 5;
  b.x.resize(static_cast<size_t>(c.rows * b.x_stride) * size_in_bytes(c.x_dtype));
  b.y.resize(static_cast<size_t>(c.rows * b.y_stride) * size_in_bytes(c.y_dtype));
  for (int64_t i = 0; i < c.rows * b.x_stride; ++i) {
    const float value = i % b.x_stride < weight.in ? normal(rng) : kNan;
    put(b.x, c.x_dtype, i, value);
    b.x_values.push_back(get(b.x, c.x_dtype, i));
  }
  for (int64_t i = 0; i < c.rows * b.y_stride; ++i) {
    b.y_before.push_back(c.add_to_y && i % b.y_stride < weight.out ? normal(rng) : kNan);
    put(b.y, c.y_dtype, i, b.y_before.back());
  }
  for (int64_t i = 0; c.with_bias && i < weight.out; ++i) b.bias.push_back(normal(rng));
  return b;
}

void run(const Weight& weight, const Case& c, Buffers& b) {
  linear({.weight = weight.packed(),
          .x_dtype = c.x_dtype,
          .y_dtype = c.y_dtype,
          .x = b.x.data(),
          .y = b.y.data(),
          .bias = c.with_bias ? b.bias.data() : nullptr,
          .rows = c.rows,
          .x_stride = b.x_stride,
          .y_stride = b.y_stride,
          .add_to_y = c.add_to_y});
}

// The number of elements that are wrong; the first few are reported.
int check(Isa isa, const Weight& weight, const Case& c, const Buffers& b) {
  const bool rounds_weights = isa == Isa::kAvx512 && c.x_dtype == DType::kBF16 && c.rows > kMaxDecodeRows;
  int wrong = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t o = 0; o < b.y_stride; ++o) {
      const float got = get(b.y, c.y_dtype, r * b.y_stride + o);
      if (o >= weight.out) {
        EXPECT_TRUE(std::isnan(got)) << "wrote behind row " << r << ": " << describe(isa, weight, c);
        continue;
      }
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < weight.in; ++k) {
        const size_t at = static_cast<size_t>(o * weight.in + k);
        const double x = b.x_values[static_cast<size_t>(r * b.x_stride + k)];
        const float w = rounds_weights ? weight.rounded[at] : weight.values[at];
        sum += x * w;
        magnitude += std::fabs(x) * weight.magnitude[at];
      }
      if (c.with_bias) sum += b.bias[static_cast<size_t>(o)];
      if (c.add_to_y) sum += b.y_before[static_cast<size_t>(r * b.y_stride + o)];
      double limit = 0x1p-22 * (magnitude + std::fabs(sum) + 2);
      if (c.y_dtype == DType::kBF16) limit += 0x1p-8 * std::fabs(sum);
      // A product of float32 scale and value may round to another bfloat16 than dequantise's: one weight in thousands.
      if (rounds_weights && weight.type == WeightType::kQ4_1) limit += 0x1p-14 * magnitude;
      if (!(std::fabs(got - sum) <= limit) && ++wrong <= 3) {
        ADD_FAILURE() << describe(isa, weight, c) << ": y[" << r << "][" << o << "] is " << got << ", wanted " << sum
                      << " +- " << limit;
      }
    }
  }
  return wrong;
}

void run_and_check(Isa isa, const Weight& weight, const Case& c, std::mt19937& rng) {
  force_isa(isa);
  Buffers buffers = make_buffers(weight, c, rng);
  run(weight, c, buffers);
  ASSERT_EQ(check(isa, weight, c, buffers), 0);
}

TEST_F(LinearTest, EqualsDoubleLoops) {
  std::mt19937 rng(1);
  for (WeightType type : kTypes) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 32}, {16, 64}, {33, 96}, {67, 256}, {144, 160}}) {
      Weight weight = make_weight(type, out, in, rng);
      pack(weight, 0, out);
      for (Isa isa : isas()) {
        for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 130}) {
          if (rows > 9 && in > 96) continue;  // long enough already
          const bool odd = rows % 2 == 1;
          run_and_check(isa, weight, {rows, DType::kF32, odd ? DType::kF32 : DType::kBF16, odd, false}, rng);
          run_and_check(isa, weight, {rows, DType::kBF16, odd ? DType::kBF16 : DType::kF32, !odd, false}, rng);
          run_and_check(isa, weight, {rows, odd ? DType::kF32 : DType::kBF16, DType::kF32, !odd, true}, rng);
        }
      }
    }
  }
}

TEST_F(LinearTest, PlainTypesTakeAnyDepth) {
  std::mt19937 rng(2);
  for (WeightType type : {WeightType::kF32, WeightType::kBF16}) {
    for (int64_t in : {1, 2, 3, 31, 46, 101}) {
      Weight weight = make_weight(type, 70, in, rng);
      pack(weight, 0, 70);
      for (Isa isa : isas()) {
        for (int64_t rows : {1, 6, 14}) {
          run_and_check(isa, weight, {rows, DType::kBF16, DType::kF32, true, false}, rng);
          run_and_check(isa, weight, {rows, DType::kF32, DType::kF32, false, true}, rng);
        }
      }
    }
  }
}

// More depth than one panel holds, and more rows than one chunk.
TEST_F(LinearTest, DepthInPartsAndRowsInChunks) {
  std::mt19937 rng(3);
  for (WeightType type : kTypes) {
    Weight deep = make_weight(type, 70, 4128, rng);
    pack(deep, 0, 70);
    Weight shallow = make_weight(type, 17, 32, rng);
    pack(shallow, 0, 17);
    for (Isa isa : isas()) {
      for (DType x_dtype : {DType::kF32, DType::kBF16}) {
        run_and_check(isa, deep, {1, x_dtype, DType::kF32, false, false}, rng);
        run_and_check(isa, deep, {15, x_dtype, DType::kBF16, true, false}, rng);
        run_and_check(isa, shallow, {1043, x_dtype, DType::kF32, false, true}, rng);
      }
    }
  }
}

// Several matrices stacked into one packed weight give the bytes of the whole, in any order of calls.
TEST_F(LinearTest, PacksInPieces) {
  std::mt19937 rng(4);
  for (WeightType type : kTypes) {
    Weight whole = make_weight(type, 45, 96, rng);
    pack(whole, 0, 45);
    const size_t size = packed_size_bytes(type, 45, 96);
    const std::vector<uint8_t> expected(whole.data.get(), whole.data.get() + size);
    std::memset(whole.data.get(), 0xff, size);
    pack(whole, 30, 15);
    pack(whole, 0, 7);
    pack(whole, 7, 23);
    EXPECT_EQ(expected, std::vector<uint8_t>(whole.data.get(), whole.data.get() + size)) << name(type);
  }
}

TEST_F(LinearTest, PackedSizeIsThatOfTheBlocks) {
  for (WeightType type : kTypes) {
    const size_t blocks = static_cast<size_t>(576 * 1536 / layout(type).block_elements * layout(type).block_bytes);
    EXPECT_EQ(packed_size_bytes(type, 576, 1536), blocks) << name(type);
    EXPECT_EQ(packed_size_bytes(type, 575, 1536), blocks) << name(type);
  }
}

TEST_F(LinearTest, DequantisesRowsToTheBit) {
  std::mt19937 rng(5);
  for (WeightType type : kTypes) {
    Weight weight = make_weight(type, 37, 128, rng);
    pack(weight, 0, 37);
    std::vector<float> row(128);
    for (int64_t o = 0; o < 37; ++o) {
      dequantise_row(weight.packed(), o, row.data());
      ASSERT_EQ(std::memcmp(row.data(), &weight.values[static_cast<size_t>(o * 128)], 128 * sizeof(float)), 0)
          << name(type) << " row " << o;
    }
  }
}

// Neither the number of threads nor the rows beside it change a bit of a row.
TEST_F(LinearTest, SameBitsForAnyThreadsAndNeighbours) {
  std::mt19937 rng(6);
  const int threads = omp_get_max_threads();
  for (WeightType type : kTypes) {
    Weight weight = make_weight(type, 150, 96, rng);
    pack(weight, 0, 150);
    for (DType x_dtype : {DType::kF32, DType::kBF16}) {
      for (int64_t rows : {8, 40}) {
        const Case c{rows, x_dtype, DType::kF32, false, false};
        Buffers first = make_buffers(weight, c, rng);
        Buffers second = first;
        run(weight, c, first);
        omp_set_num_threads(5);
        run(weight, c, second);
        omp_set_num_threads(threads);
        ASSERT_EQ(first.y, second.y) << name(type);
        const Case fewer{rows == 8 ? 3 : 23, x_dtype, DType::kF32, false, false};
        Buffers part = first;
        run(weight, fewer, part);
        ASSERT_EQ(first.y, part.y) << name(type);
      }
    }
  }
}

TEST_F(LinearTest, NonFiniteInputsReachTheirRowOnly) {
  std::mt19937 rng(7);
  Weight weight = make_weight(WeightType::kQ4_1, 48, 64, rng);
  pack(weight, 0, 48);
  for (int64_t rows : {4, 20}) {
    const Case c{rows, DType::kBF16, DType::kF32, false, false};
    Buffers b = make_buffers(weight, c, rng);
    put(b.x, DType::kBF16, 2 * b.x_stride + 5, kNan);
    run(weight, c, b);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < 48; ++o) {
        EXPECT_EQ(std::isnan(get(b.y, DType::kF32, r * b.y_stride + o)), r == 2) << "row " << r << " output " << o;
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::cpu
