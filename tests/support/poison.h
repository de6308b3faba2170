// Output and scratch buffers that expose reading before writing and writing outside: filled with NaN (integers: a value
// that no kernel returns), surrounded by guard words, and aligned to 16 bytes but to no more.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "base/bf16.h"

namespace sparsek::test {

template <class T>
T poison_value() {
  if constexpr (std::is_floating_point_v<T>) {
    return std::numeric_limits<T>::quiet_NaN();
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16{0x7fc1};
  } else {
    return static_cast<T>(0x7a5a7a5a7a5a7a5a);
  }
}

template <class T>
class Poisoned {
 public:
  explicit Poisoned(int64_t count) : count_(count), bytes_(count * sizeof(T) + 2 * kGuardBytes + 64) {
    const size_t misalignment = reinterpret_cast<uintptr_t>(bytes_.data()) % 64;
    start_ = kGuardBytes + (64 - misalignment) % 64 + 16;  // data() is 16 modulo 64
    for (size_t n = 0; n < bytes_.size(); ++n) bytes_[n] = guard(n);
    fill(poison_value<T>());
  }
  Poisoned(int64_t count, T value) : Poisoned(count) { fill(value); }
  // Holds a copy of `values`: an input that is guarded too.
  explicit Poisoned(const std::vector<T>& values) : Poisoned(static_cast<int64_t>(values.size())) {
    if (!values.empty()) std::memcpy(bytes_.data() + start_, values.data(), values.size() * sizeof(T));
  }
  Poisoned(const Poisoned& other) : Poisoned(other.to_vector()) {}  // alignment differs between the two
  Poisoned& operator=(const Poisoned&) = delete;

  T* data() { return reinterpret_cast<T*>(bytes_.data() + start_); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data() + start_); }
  int64_t size() const { return count_; }
  T& operator[](int64_t n) { return data()[n]; }
  const T& operator[](int64_t n) const { return data()[n]; }
  std::vector<T> to_vector() const { return {data(), data() + count_}; }

  void fill(T value) {
    for (int64_t n = 0; n < count_; ++n) data()[n] = value;
  }

  bool guards_intact() const {
    const size_t end = start_ + count_ * sizeof(T);
    for (size_t n = 0; n < bytes_.size(); ++n) {
      if ((n < start_ || n >= end) && bytes_[n] != guard(n)) return false;
    }
    return true;
  }
  // The first element that still holds the poison, or -1.
  int64_t first_unwritten() const {
    const T poison = poison_value<T>();
    for (int64_t n = 0; n < count_; ++n) {
      if (std::memcmp(data() + n, &poison, sizeof(T)) == 0) return n;
    }
    return -1;
  }

 private:
  static constexpr size_t kGuardBytes = 256;
  static uint8_t guard(size_t n) { return static_cast<uint8_t>(0xa0 + n % 23); }

  int64_t count_;
  size_t start_ = 0;
  std::vector<uint8_t> bytes_;
};

}  // namespace sparsek::test

// Nothing was written outside the buffer.
#define EXPECT_GUARDS_INTACT(buffer) EXPECT_TRUE((buffer).guards_intact()) << #buffer ": written outside its bounds"
// Every element was written.
#define EXPECT_FULLY_WRITTEN(buffer) EXPECT_EQ((buffer).first_unwritten(), -1) << #buffer ": element left unwritten"
