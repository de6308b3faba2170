// OpenMP loop whose body may throw: the first exception is thrown again once all threads have left the loop.
#pragma once
#include <cstdint>
#include <exception>

namespace sparsek::cpu {

// body(i) for i in [0, count), handed out one at a time in ascending order.
template <class Body>
void parallel_for(int64_t count, Body&& body) {
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical(sparsek_parallel_for)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace sparsek::cpu
