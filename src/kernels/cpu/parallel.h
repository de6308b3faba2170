// Exceptions and OpenMP: one that leaves a parallel region ends the program, so that the first one is kept and thrown
// again behind the region.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>

namespace sparsek::cpu {

// Declared before a parallel region; threads do their work in guard(), and rethrow() follows the region.
class FirstError {
 public:
  template <class Body>
  void guard(const Body& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!taken_.exchange(true)) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;  // read behind the region's barrier only
};

// body(i) for i in [0, count), handed out one at a time in ascending order.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  FirstError error;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t i = 0; i < count; ++i) error.guard([&] { body(i); });
  error.rethrow();
}

}  // namespace sparsek::cpu
