// Calls a function for every run of every (batch row, KV head), on all OpenMP threads, each with its own scratch.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/cpu/attention/arena.h"
#include "kernels/cpu/attention/plan.h"

namespace sparsek::cpu {

// Grows, never shrinks.
class ScratchMemory {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_bytes_) {
      size_bytes_ = (bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(Arena::kAlignment, size_bytes_)));
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_bytes_ = 0;
};

// Runs in the order (batch row, KV head, first query). shape_of(batch, kv_head) gives the row arrays;
// body(plan, scratch, run index within its head) does the work.
template <class ShapeOf, class Body>
void for_each_run(int32_t batch, int32_t num_kv_heads, int32_t seqlen_q, int32_t tile, int32_t run_length,
                  const ShapeOf& shape_of, const Body& body) {
  const int64_t runs = (seqlen_q + run_length - 1) / run_length, heads = static_cast<int64_t>(batch) * num_kv_heads;
#pragma omp parallel
  {
    RunPlanner planner;
    ScratchMemory scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < heads * runs; ++n) {
      const auto head = static_cast<int32_t>(n / runs), run = static_cast<int32_t>(n % runs);
      const int32_t b = head / num_kv_heads, kv_head = head % num_kv_heads, first = run * run_length;
      const int32_t end = first + run_length < seqlen_q ? first + run_length : seqlen_q;
      body(planner.plan(shape_of(b, kv_head), b, kv_head, first, end, tile), &scratch, run);
    }
  }
}

}  // namespace sparsek::cpu
