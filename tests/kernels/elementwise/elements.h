// What the elementwise tests share: guarded arrays of bf16 or f32 seen as doubles, the instruction sets this processor
// has, and the error bound of one rounded element.
#pragma once
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "base/dtype.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::test {

// `count` elements, NaN at first, with guard bytes on both sides.
class Elements {
 public:
  Elements(DType dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(size() + 2 * kGuardBytes, kGuard) {
    for (int64_t i = 0; i < count; ++i) set(i, std::nan(""));
  }
  void* data() { return bytes_.data() + kGuardBytes; }
  float* floats() { return static_cast<float*>(data()); }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const {
    const unsigned char* at = bytes_.data() + kGuardBytes + i * size_in_bytes(dtype_);
    if (dtype_ == DType::kBF16) {
      BFloat16 x;
      std::memcpy(&x, at, sizeof x);
      return to_float(x);
    }
    float x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
  void set(int64_t i, double value) {
    unsigned char* at = bytes_.data() + kGuardBytes + i * size_in_bytes(dtype_);
    const float x = static_cast<float>(value);
    const BFloat16 half = to_bf16(x);
    std::memcpy(at, dtype_ == DType::kBF16 ? static_cast<const void*>(&half) : &x, size_in_bytes(dtype_));
  }
  void fill_normal(std::mt19937& random, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < count_; ++i) set(i, normal(random));
  }
  bool guards_intact() const {
    for (size_t i = 0; i < kGuardBytes; ++i) {
      if (bytes_[i] != kGuard || bytes_[bytes_.size() - 1 - i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuardBytes = 128;
  static constexpr unsigned char kGuard = 0xa5;
  size_t size() const { return count_ * size_in_bytes(dtype_); }
  DType dtype_;
  int64_t count_;
  std::vector<unsigned char> bytes_;
};

// True when `got` is `wanted` up to float32 arithmetic on terms of size `magnitude` and one rounding to `dtype`. False
// for NaN.
inline bool is_close(double got, double wanted, double magnitude, DType dtype) {
  const double rounding = dtype == DType::kBF16 ? 0x1p-8 * std::abs(wanted) : 0;
  return std::abs(got - wanted) <= rounding + 2e-6 * magnitude + 1e-37;
}

// One test per instruction set; those the processor lacks are skipped.
class EveryIsa : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    if (static_cast<int>(GetParam()) > static_cast<int>(cpu::best_isa())) GTEST_SKIP() << "not on this processor";
    cpu::force_isa(GetParam());
  }
  void TearDown() override { cpu::force_isa(cpu::best_isa()); }
};
inline auto all_isas() {
  return ::testing::Values(cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512);
}
inline std::string isa_name(const ::testing::TestParamInfo<cpu::Isa>& info) {
  return cpu::name(info.param);
}

inline constexpr DType kActivationTypes[] = {DType::kBF16, DType::kF32};

}  // namespace sparsek::test
