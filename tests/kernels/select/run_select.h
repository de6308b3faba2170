// Calls select on scores [batch, seqlen, num_kv_heads] with buffers that expose what is not written or not ours.
#pragma once
#include <gtest/gtest.h>

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
