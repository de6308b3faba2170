// The operations as C++ functions (ops.h): their registrations survive static linking, options arrive, and a state that
// is read in chunks and tokens gives the whole sequence's output. Everything else is tested from Python (tests/python).
#include "ops/ops.h"

#include <ATen/Context.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <vector>

namespace sparsek::ops {
namespace {

constexpr int64_t kSeqlen = 90, kTopk = 5, kWindow = 7, kSinks = 3, kHeadDim = 16, kKvHeads = 2;

struct Inputs {
  Tensor q, k, v, q_far, k_far;
};

Inputs make_inputs() {
  at::manual_seed(17);
  const auto normal = [](int64_t heads) { return at::randn({2, kSeqlen, heads, kHeadDim}, at::kDouble); };
  return {normal(4), normal(kKvHeads), normal(kKvHeads), normal(4), normal(kKvHeads)};
}

AttentionState make_state(bool delayed_scores) {
  return new_attention_state({.batch = 2,
                              .num_kv_heads = kKvHeads,
                              .head_dim = kHeadDim,
                              .topk = kTopk,
                              .window_size = kWindow,
                              .num_sinks = kSinks,
                              .pool_size = 11,
                              .far_rotary = true,
                              .delayed_scores = delayed_scores,
                              .dtype = at::kDouble});
}

AttentionOptions make_options(bool delayed_scores) {
  return {.topk = kTopk,
          .window_size = kWindow,
          .num_sinks = kSinks,
          .pool_size = 11,
          .gate = "hard",
          .softmax_scale = 0.3,
          .delayed_scores = delayed_scores};
}

TEST(Ops, ChunksAndTokensEqualTheWholeSequence) {
  const Inputs x = make_inputs();
  const Tensor y = window_mass(x.q, x.k, kWindow, kSinks, 0.3, x.q_far, x.k_far);
  const auto [whole, whole_lse] =
      attention(x.q, x.k, x.v, y, kTopk, kWindow, kSinks, 11, "hard", 0.3, x.q_far, x.k_far);

  const AttentionOptions options = make_options(true);
  AttentionState state = make_state(true);
  const int64_t size_before = size_in_bytes(state);
  std::vector<Tensor> outs;
  int64_t begin = 0;
  for (const int64_t chunk : {3, 20, 1, 30}) {
    const auto cut = [&](const Tensor& tensor) { return tensor.narrow(1, begin, chunk); };
    const auto [leaving, ring_mass] = window_mass_chunk(cut(x.q), cut(x.k), state, options, cut(x.q_far), cut(x.k_far));
    auto [out, lse, next] =
        attention_chunk(cut(x.q), cut(x.k), cut(x.v), leaving, state, options, cut(x.q_far), cut(x.k_far));
    EXPECT_TRUE(at::allclose(lse, whole_lse.narrow(2, begin, chunk), 1e-9, 1e-9));
    outs.push_back(out);
    state = next;
    state.ring_mass = ring_mass;
    begin += chunk;
  }
  for (; begin < kSeqlen; ++begin) {
    const auto cut = [&](const Tensor& tensor) { return tensor.narrow(1, begin, 1); };
    const Tensor leaving = leaving_mass(state, options);
    outs.push_back(decode_step(cut(x.q), cut(x.k), cut(x.v), leaving, state, options, cut(x.q_far), cut(x.k_far)));
  }
  EXPECT_TRUE(at::allclose(at::cat(outs, 1), whole, 1e-8, 1e-8));
  EXPECT_EQ(size_in_bytes(state), size_before);
}

TEST(Ops, StateHasTheSizeOfSection6) {
  AttentionStateOptions options{.num_kv_heads = 3, .head_dim = 64, .topk = 508, .window_size = 512, .num_sinks = 4};
  const auto rows_and_slots = [&](int64_t far) {
    const int64_t rows = 3 * 64 * 2 * (2 * (4 + 512 + 508) + far * 512);
    return rows + 3 * (508 * 12 + 4 * 2032) + 3 * 512 * 4 /* ring_scores */ + 3 * 3 * 8 + 8;
  };
  EXPECT_EQ(size_in_bytes(new_attention_state(options)), rows_and_slots(0));
  options.far_rotary = true;
  EXPECT_EQ(size_in_bytes(new_attention_state(options)), rows_and_slots(1));
  options.delayed_scores = true;
  EXPECT_EQ(size_in_bytes(new_attention_state(options)), rows_and_slots(1) + 3 * 512 * 4);
  EXPECT_EQ(default_pool_size(508), 2032);
  EXPECT_EQ(default_pool_size(100), 1024);
}

TEST(Ops, WrongInputsThrowWithBothShapes) {
  const Inputs x = make_inputs();
  const Tensor scores = at::randn({2, kSeqlen, kKvHeads}, at::kDouble);
  try {
    attention(x.q, x.k.narrow(1, 0, 8), x.v, scores, kTopk, kWindow);
    FAIL() << "accepted a k of another length";
  } catch (const c10::Error& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "k must be [batch, seqlen, num_kv_heads, head_dim] = [2, 90, 2, 16], got [2, 8, 2, 16]");
  }
}

}  // namespace
}  // namespace sparsek::ops
