// An order of [0, size) that a seed decides, in constant memory: a Feistel network over the next power of four, walked
// on until it lands inside (fewer than four steps on average).
#pragma once
#include <bit>
#include <cassert>
#include <cstdint>

namespace sparsek {

// splitmix64's finish: every bit of the input changes half the bits.
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline uint64_t mix_bits(uint64_t a, uint64_t b) {
  return mix_bits(mix_bits(a + 0x9e3779b97f4a7c15u) ^ b);
}

class Permutation {
 public:
  Permutation(int64_t size, uint64_t seed) : size_(static_cast<uint64_t>(size)), seed_(seed) {
    assert(size > 0);
    const int bits = std::bit_width(size_ - 1);
    half_bits_ = bits < 2 ? 1 : (bits + 1) / 2;
  }
  int64_t operator()(int64_t i) const {
    assert(i >= 0 && static_cast<uint64_t>(i) < size_);
    auto x = static_cast<uint64_t>(i);
    do {
      x = step(x);
    } while (x >= size_);
    return static_cast<int64_t>(x);
  }

 private:
  static constexpr uint64_t kRounds = 6;  // of which four hide the structure, on small halves two more do
  uint64_t step(uint64_t x) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (mix_bits(seed_ + round * 0x9e3779b97f4a7c15u, right) & mask);
      left = right;
      right = next;
    }
    return left << half_bits_ | right;
  }

  uint64_t size_, seed_;
  int half_bits_;
};

}  // namespace sparsek
