// One thread's scratch memory, carved into arrays. A kernel describes its arrays once, as a constructor that takes them
// from an Arena: over a null base it only counts the bytes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsek::cpu {

class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  inline __attribute__((always_inline)) T* take(int64_t count) {
    char* start = base_ ? base_ + used_bytes_ : nullptr;
    used_bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(start);
  }
  size_t used_bytes() const { return used_bytes_; }

  static constexpr size_t kAlignment = 64;

 private:
  char* base_;
  size_t used_bytes_ = 0;
};

}  // namespace sparsek::cpu
