// Memory of one thread, kept between calls: it grows, never shrinks, and starts at a cache line.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparsek::cpu {

class ScratchMemory {
 public:
  static constexpr size_t kAlignment = 64;

  // What it held before is lost.
  char* at_least(size_t bytes) {
    if (bytes > size_bytes_) {
      const size_t size_bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size_bytes)));
      size_bytes_ = memory_ ? size_bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }
  template <class T>
  T* array(size_t count) {
    return reinterpret_cast<T*>(at_least(count * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_bytes_ = 0;
};

}  // namespace sparsek::cpu
