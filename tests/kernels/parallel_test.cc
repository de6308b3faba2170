// Exceptions leave parallel regions as themselves, whichever thread met them.
#include "kernels/cpu/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <stdexcept>
#include <vector>

#include "kernels/cpu/attention/runs.h"

namespace sparsek::cpu {
namespace {

TEST(Parallel, AnErrorOfAnyIndexIsThrownAgain) {
  for (const int64_t bad : {0, 7, 99}) {
    std::atomic<int> calls = 0;
    const auto body = [&](int64_t i) {
      ++calls;
      if (i == bad) throw std::out_of_range("found");
    };
    EXPECT_THROW(parallel_for(100, body), std::out_of_range);
    EXPECT_EQ(calls, 100);
  }
}

TEST(Parallel, OneErrorOfManyIsThrown) {
  EXPECT_THROW(parallel_for(100, [](int64_t) { throw std::bad_alloc(); }), std::bad_alloc);
}

TEST(Parallel, RunsThrowTheErrorsOfTheirBody) {
  constexpr int32_t kQueries = 256;
  const std::vector<int32_t> window_begin(2 * kQueries), far_begin(2 * kQueries, kQueries), far_end(2 * kQueries);
  AttentionFwdParams params{};
  params.window_begin = window_begin.data();
  params.far_begin = far_begin.data();
  params.far_end = far_end.data();
  params.batch = 2;
  params.num_heads = params.num_kv_heads = 1;
  params.seqlen_q = params.seqlen_k = kQueries;
  const auto fail_at = [&](int64_t bad) {
    for_each_run(params, 16, 64, [&](const RunPlan&, ScratchMemory*, int64_t n) {
      if (n == bad) throw std::bad_alloc();
    });
  };
  EXPECT_THROW(fail_at(0), std::bad_alloc);
  EXPECT_THROW(fail_at(5), std::bad_alloc);
  EXPECT_NO_THROW(fail_at(-1));
}

}  // namespace
}  // namespace sparsek::cpu
