// Calls a function for every run of every (batch row, KV head), on all OpenMP threads, each with its own scratch.
#pragma once
#include "kernels/cpu/attention/arena.h"
#include "kernels/cpu/attention/plan.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch_memory.h"

static_assert(sparsek::cpu::ScratchMemory::kAlignment >= sparsek::cpu::Arena::kAlignment);

namespace sparsek::cpu {

// The two parameter structs that have rows differ in one thing: window_mass gives all heads the same far rows.
inline RunShape run_shape(const AttentionFwdParams& p, int32_t batch, int32_t kv_head) {
  const int64_t rows = (static_cast<int64_t>(batch) * p.num_kv_heads + kv_head) * p.seqlen_k;
  return {p.window_begin + static_cast<int64_t>(batch) * p.seqlen_q,
          p.far_begin + rows,
          p.far_end + rows,
          p.seqlen_q,
          p.seqlen_k,
          p.num_carried};
}
inline RunShape run_shape(const WindowMassParams& p, int32_t batch, int32_t) {
  const int64_t rows = static_cast<int64_t>(batch) * p.seqlen_k;
  return {p.window_begin + static_cast<int64_t>(batch) * p.seqlen_q,
          p.far_begin + rows,
          p.far_end + rows,
          p.seqlen_q,
          p.seqlen_k,
          p.num_carried};
}

// Runs in the order (batch row, KV head, first query). body(plan, scratch, index of the run).
template <class Params, class Body>
void for_each_run(const Params& p, int32_t tile, int32_t run_length, const Body& body) {
  const int64_t runs = (p.seqlen_q + run_length - 1) / run_length;
  const int64_t items = static_cast<int64_t>(p.batch) * p.num_kv_heads * runs;
  FirstError error;
#pragma omp parallel
  {
    // Kept for the next call: a model calls once a layer and chunk, and fresh pages cost more than planning does.
    thread_local RunPlanner planner;
    thread_local ScratchMemory scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < items; ++n) {
      const auto lane = static_cast<int32_t>(n / runs), first = static_cast<int32_t>(n % runs) * run_length;
      const int32_t batch = lane / p.num_kv_heads, kv_head = lane % p.num_kv_heads;
      const int32_t end = first + run_length < p.seqlen_q ? first + run_length : p.seqlen_q;
      error.guard(
          [&] { body(planner.plan(run_shape(p, batch, kv_head), batch, kv_head, first, end, tile), &scratch, n); });
    }
  }
  error.rethrow();
}

}  // namespace sparsek::cpu
