// Hands out parts of a workspace, or only counts what they need.
#pragma once
#include <cstdint>

namespace sparsek::cuda {

class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T>
  void take(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  int64_t used_bytes() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace sparsek::cuda
