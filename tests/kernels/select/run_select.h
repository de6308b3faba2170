// Calls select on scores [batch, seqlen, num_kv_heads] with buffers that expose what is not written or not ours.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/cpu/select/select.h"
#include "kernels/reference/reference.h"
#include "tests/support/compare.h"
#include "tests/support/generate.h"
#include "tests/support/poison.h"

namespace sparsek::test {

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::kF64 : DType::kF32;

inline Strides contiguous(int64_t seqlen, int64_t heads) {
  return {seqlen * heads, heads, 1};
}

// Any sizes up to small multiples of max_seqlen; sometimes packed documents of min_document to max_document positions.
inline reference::Spec random_spec(std::mt19937_64& engine, int64_t max_seqlen, int64_t min_document,
                                   int64_t max_document) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  reference::Spec spec;
  spec.seqlen = pick(1, max_seqlen);
  spec.batch = pick(1, 2);
  spec.num_kv_heads = pick(1, 3);
  spec.topk = pick(0, 4) ? pick(1, 8) : pick(1, 2 * max_seqlen);
  spec.window_size = pick(0, 4) ? pick(1, 8) : pick(1, 2 * max_seqlen);
  spec.num_sinks = pick(0, 1) ? 0 : pick(1, 6);
  spec.pool_size = pick(0, 1) ? 0 : spec.topk + pick(1, 12);
  if (pick(0, 2) == 0) {
    spec.batch = 1;
    spec.cu_seqlens = {0};
    while (spec.cu_seqlens.back() < spec.seqlen) {
      spec.cu_seqlens.push_back(std::min(spec.seqlen, spec.cu_seqlens.back() + pick(min_document, max_document)));
    }
  }
  return spec;
}

template <class T>
struct SelectResult {
  std::vector<T> tau;
  std::vector<int32_t> expiry, frac_begin, frac_end;
};

template <class T>
SelectResult<T> run_select(const std::vector<T>& scores, const reference::Spec& spec) {
  const auto size = static_cast<int64_t>(scores.size());
  Poisoned<T> in(scores), tau(size);
  Poisoned<int32_t> expiry(size), frac_begin(size), frac_end(size);
  const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());
  const Strides strides = contiguous(spec.seqlen, spec.num_kv_heads);
  SelectParams params{};
  params.dtype = kDType<T>;
  params.scores = in.data();
  params.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  params.tau = tau.data();
  params.expiry = expiry.data();
  params.frac_begin = frac_begin.data();
  params.frac_end = frac_end.data();
  params.scores_strides = params.out_strides = strides;
  params.batch = static_cast<int32_t>(spec.batch);
  params.seqlen = static_cast<int32_t>(spec.seqlen);
  params.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  params.num_documents = cu_seqlens.empty() ? 0 : static_cast<int32_t>(cu_seqlens.size()) - 1;
  params.topk = static_cast<int32_t>(spec.topk);
  params.window_size = static_cast<int32_t>(spec.window_size);
  params.num_sinks = static_cast<int32_t>(spec.num_sinks);
  params.pool_size = static_cast<int32_t>(spec.pool_size);
  cpu::select(params);
  EXPECT_FULLY_WRITTEN(tau);
  EXPECT_FULLY_WRITTEN(expiry);
  EXPECT_FULLY_WRITTEN(frac_begin);
  EXPECT_FULLY_WRITTEN(frac_end);
  EXPECT_GUARDS_INTACT(tau);
  EXPECT_GUARDS_INTACT(expiry);
  EXPECT_GUARDS_INTACT(frac_begin);
  EXPECT_GUARDS_INTACT(frac_end);
  return {tau.to_vector(), expiry.to_vector(), frac_begin.to_vector(), frac_end.to_vector()};
}

}  // namespace sparsek::test
