// Tensors that no operation made: every entry of the row arrays and of a carried state, replaced by values that would
// be read as an index or compared as a rank. An operation refuses them or computes something; it never reads or writes
// outside its tensors, which the address sanitizer watches, and a refused state is left as it was.
#include <ATen/ops/equal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace sparsek::ops {
namespace {

constexpr int64_t kBatch = 2, kSeqlen = 150, kHeads = 4, kKvHeads = 2, kHeadDim = 16;
constexpr int64_t kTopk = 5, kWindow = 7, kSinks = 2, kPool = 11;
constexpr double kScale = 0.25;

class Hostile {
 public:
  explicit Hostile(uint64_t seed) : random_(seed) {}

  int64_t pick(int64_t count) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(count)); }

  // A copy with one entry, or all from one on, replaced.
  Tensor spoil(const Tensor& tensor) {
    Tensor copy = tensor.clone();
    Tensor flat = copy.view({-1});
    const int64_t first = pick(flat.numel()), count = pick(3) == 0 ? flat.numel() - first : 1;
    flat.narrow(0, first, count).fill_(value(tensor.scalar_type()));
    return copy;
  }

 private:
  at::Scalar value(at::ScalarType dtype) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    if (at::isFloatingType(dtype)) {
      constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
      const double values[] = {kNan, kNan, kInfinity, -kInfinity, 1e30, -1e30, 0};
      return values[pick(std::size(values))];
    }
    const int64_t largest =
        dtype == at::kInt ? std::numeric_limits<int32_t>::max() : std::numeric_limits<int64_t>::max();
    const int64_t values[] = {-largest - 1, -largest,    -1,      0,           1,
                              kSeqlen / 2,  kSeqlen - 1, kSeqlen, kSeqlen + 1, largest};
    return values[pick(std::size(values))];
  }

  std::mt19937_64 random_;
};

// Whether the call was refused.
bool refuses(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception&) {
    return true;
  }
  return false;
}

Tensor normal(int64_t seqlen, int64_t heads, at::ScalarType dtype) {
  return at::randn({kBatch, seqlen, heads, kHeadDim}, at::kDouble).to(dtype);
}

using Backward = Tensors6(const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&,
                          const MaybeTensor&, const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          std::string_view, double, bool, std::optional<int64_t>, const MaybeTensor&);
using MassRows = Tensor(const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, const Tensor&,
                        const Tensor&, const Tensor&, const MaybeTensor&, int64_t, double);

TEST(Hostile, RowArrays) {
  at::manual_seed(3);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const Tensor q = normal(kSeqlen, kHeads, dtype), k = normal(kSeqlen, kKvHeads, dtype),
                 v = normal(kSeqlen, kKvHeads, dtype);
    const Tensor scores = at::randn({kBatch, kSeqlen, kKvHeads}, scores_dtype(dtype));
    const auto [tau, expiry, frac_begin, frac_end] = select(scores, kTopk, kWindow, kSinks, kPool);
    const auto rows = call_visibility(scores, tau, expiry, frac_begin, frac_end, kWindow, kSinks, {});
    const auto& [row_scores, row_tau, window_begin, far_begin, far_end, row_frac_begin, row_frac_end] = rows;
    const auto [out, lse] = call_attention_rows(q, k, v, {}, {}, row_scores, row_tau, window_begin, far_begin, far_end,
                                                row_frac_begin, row_frac_end, "soft", kScale, false, {}, {});
    const Tensor dout = at::ones_like(out);
    const auto forward = [&](const Tensor& window, const Tensor& begin, const Tensor& end, const Tensor&,
                             const Tensor&) {
      call_attention_rows(q, k, v, {}, {}, row_scores, row_tau, window, begin, end, row_frac_begin, row_frac_end,
                          "soft", kScale, false, {}, {});
    };
    const auto backward = [&](const Tensor& window, const Tensor& begin, const Tensor& end, const Tensor& frac_from,
                              const Tensor& frac_to) {
      static const auto operation = find_operation<Backward>("sparsek::attention_backward");
      operation.call(dout, {}, q, k, v, {}, {}, row_scores, row_tau, window, begin, end, frac_from, frac_to, out, lse,
                     "soft", kScale, false, {}, {});
    };
    const auto mass = [&](const Tensor& window, const Tensor& begin, const Tensor& end, const Tensor&, const Tensor&) {
      static const auto operation = find_operation<MassRows>("sparsek::_window_mass_rows");
      operation.call(q, k, {}, {}, window, begin.select(1, 0).contiguous(), end.select(1, 0).contiguous(), {}, kWindow,
                     kScale);
    };
    const std::vector<std::function<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>>
        calls = {forward, backward, mass};
    for (const auto& call : calls) {
      EXPECT_FALSE(refuses([&] { call(window_begin, far_begin, far_end, row_frac_begin, row_frac_end); }));
    }
    int64_t num_refused = 0;
    for (uint64_t seed = 0; seed < 120; ++seed) {
      Hostile hostile(seed);
      std::vector<Tensor> arrays = {window_begin, far_begin, far_end, row_frac_begin, row_frac_end};
      Tensor& array = arrays[hostile.pick(5)];
      array = hostile.spoil(array);
      for (const auto& call : calls) {
        num_refused += refuses([&] { call(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]); });
      }
    }
    EXPECT_GT(num_refused, 60);
  }
}

Tensor* field(AttentionState& state, int64_t index) {
  Tensor* const fields[] = {&state.ring_scores,    &state.ring_mass,   &state.slot_scores,
                            &state.slot_positions, &state.pool_scores, &state.lengths};
  return fields[index];
}

// The state's pool, 0: no limit (its tensor grows, and there is no decode_step); and whether far keys are rotated.
class HostileStates : public testing::TestWithParam<std::tuple<int64_t, bool>> {};
INSTANTIATE_TEST_SUITE_P(Pools, HostileStates, testing::Combine(testing::Values(kPool, 0), testing::Bool()));

TEST_P(HostileStates, AreRefusedOrComputed) {
  const auto [pool_size, far_rotary] = GetParam();
  at::manual_seed(4);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const int64_t length : {1, 9, 15, 60}) {  // in the window, first candidates, slots filling, full
      const AttentionOptions options{
          .topk = kTopk, .window_size = kWindow, .num_sinks = kSinks, .pool_size = pool_size};
      const AttentionState empty = new_attention_state({.batch = kBatch,
                                                        .num_kv_heads = kKvHeads,
                                                        .head_dim = kHeadDim,
                                                        .topk = kTopk,
                                                        .window_size = kWindow,
                                                        .num_sinks = kSinks,
                                                        .pool_size = pool_size,
                                                        .far_rotary = far_rotary,
                                                        .delayed_scores = true,
                                                        .dtype = dtype});
      const auto scores = [&](int64_t seqlen) { return at::randn({kBatch, seqlen, kKvHeads}, scores_dtype(dtype)); };
      const auto far = [&, rotated = far_rotary](const Tensor& x) { return rotated ? MaybeTensor(-x) : MaybeTensor(); };
      const auto chunk = [&](const AttentionState& state, int64_t seqlen) {
        const Tensor q = normal(seqlen, kHeads, dtype), k = normal(seqlen, kKvHeads, dtype);
        const MaybeTensor q_far = far(q), k_far = far(k);
        window_mass_chunk(q, k, state, options, q_far, k_far);
        return std::get<2>(attention_chunk(q, k, k, scores(seqlen), state, options, q_far, k_far));
      };
      const AttentionState filled = chunk(empty, length);
      for (uint64_t seed = 0; seed < 120; ++seed) {
        SCOPED_TRACE(testing::Message() << "dtype " << dtype << ", length " << length << ", seed " << seed);
        Hostile hostile(seed);
        AttentionState state = filled;
        const int64_t index = hostile.pick(2) == 0 ? 4 : hostile.pick(6);  // the pool has most to go wrong
        *field(state, index) = hostile.spoil(*field(state, index));
        const Tensor spoiled = field(state, index)->clone();
        refuses([&] { chunk(state, 1 + hostile.pick(40)); });
        refuses([&] { leaving_mass(state, options); });
        if (pool_size == 0) continue;
        for (int64_t i = 0; i < 6; ++i) *field(state, i) = field(state, i)->clone();
        const Tensor q = normal(1, kHeads, dtype), k = normal(1, kKvHeads, dtype);
        if (refuses([&] { decode_step(q, k, k, scores(1), state, options, far(q), far(k)); })) {
          EXPECT_TRUE(at::equal(spoiled.nan_to_num(), field(state, index)->nan_to_num()));
          EXPECT_TRUE(index == 5 || at::equal(state.lengths, filled.lengths));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::ops
