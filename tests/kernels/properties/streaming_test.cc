// eq. 12 and 13: tokens, chunks of any sizes and whole sequences select the same keys and give the reference's outputs
// and gradients.
#include "tests/kernels/properties/problems.h"
#include "tests/kernels/properties/run_streaming.h"

namespace sparsek::test {
namespace {

// The positions in slots after every piece against A_i of the reference.
void expect_selection(const Run& run, const Problem& problem) {
  const Spec& spec = problem.spec;
  const reference::Selection expected = reference::select(problem.inputs.scores, spec);
  for (const Run::Selected& selected : run.selected) {
    for (int64_t unit = 0; unit < spec.batch * spec.num_kv_heads; ++unit) {
      Indices keys;
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        const int64_t at = (unit / spec.num_kv_heads * spec.seqlen + j) * spec.num_kv_heads + unit % spec.num_kv_heads;
        if (j + spec.window_size <= selected.query && selected.query < expected.expiry[at]) keys.push_back(j);
      }
      ASSERT_EQ(selected.positions[unit], keys) << "after query " << selected.query << " unit " << unit;
    }
  }
}

void expect_tau(const Run& run, const Problem& problem) {
  const Values tau = reference::select(problem.inputs.scores, problem.spec).tau;
  EXPECT_ELEMENTS_CLOSE(run.tau, tau, 1e-6);
}

template <class Element>
class Streaming : public ::testing::Test {};
using Elements = ::testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(Streaming, Elements);

TYPED_TEST(Streaming, ChunksEqualTheWhole) {
  for_each_isa<TypeParam>([] {
    for_each_problem<TypeParam>([](Problem problem) {
      const int64_t pool_size = problem.spec.pool_size;
      for (int64_t pool : {pool_size, int64_t{0}}) {
        problem.spec.pool_size = pool;
        const reference::AttentionOutputs expected = reference::attention_forward(problem.inputs, problem.spec);
        expect_outputs<TypeParam>(run_whole<TypeParam>(problem), expected, problem);
        for (const Indices& sizes : chunkings(problem.spec, pool)) {
          SCOPED_TRACE(fmt::format("pool {} chunks {} .. {} ({})", pool, sizes.front(), sizes.back(), sizes.size()));
          StreamingRun<TypeParam> streaming(problem);
          for (int64_t size : sizes) streaming.read_chunk(size);
          expect_selection(streaming.run(), problem);
          expect_tau(streaming.run(), problem);
          expect_outputs<TypeParam>(streaming.run(), expected, problem);
          if (::testing::Test::HasFailure()) return;
        }
      }
    });
  });
}

TYPED_TEST(Streaming, TokensEqualTheWhole) {
  for_each_isa<TypeParam>([] {
    for_each_problem<TypeParam>([](const Problem& problem) {
      const reference::AttentionOutputs expected = reference::attention_forward(problem.inputs, problem.spec);
      StreamingRun<TypeParam> streaming(problem);
      streaming.decode(problem.spec.seqlen);
      expect_selection(streaming.run(), problem);
      expect_outputs<TypeParam>(streaming.run(), expected, problem);
    });
  });
}

TYPED_TEST(Streaming, ChunksAndTokensMix) {
  for_each_problem<TypeParam>([](const Problem& problem) {
    const reference::AttentionOutputs expected = reference::attention_forward(problem.inputs, problem.spec);
    StreamingRun<TypeParam> streaming(problem);
    bool chunk = true;
    const Indices sizes = chunkings(problem.spec, problem.spec.pool_size).back();
    for (int64_t size : sizes) {
      chunk ? streaming.read_chunk(size) : streaming.decode(size);
      chunk = !chunk;
    }
    expect_selection(streaming.run(), problem);
    expect_outputs<TypeParam>(streaming.run(), expected, problem);
  });
}

// Sizes at which kernels use several tiles and threads, batch rows and KV heads fewer than threads included.
TYPED_TEST(Streaming, SeveralTilesAndThreads) {
  for_each_isa<TypeParam>([] {
    for (int64_t kv_heads : {int64_t{1}, int64_t{3}}) {
      Spec spec = spec_of(621, 140, 150, 4, 400);
      spec.batch = 1;
      spec.num_heads = 3 * kv_heads;
      spec.num_kv_heads = kv_heads;
      spec.head_dim = 64;
      const Problem problem = make_problem<TypeParam>(
          spec, kv_heads == 1 ? ScoreKind::kRising : ScoreKind::kNormalSmall, kv_heads == 3, 95);
      SCOPED_TRACE(problem.text);
      const reference::AttentionOutputs expected = reference::attention_forward(problem.inputs, problem.spec);
      expect_outputs<TypeParam>(run_whole<TypeParam>(problem), expected, problem);
      StreamingRun<TypeParam> chunks(problem), tokens(problem);
      for (int64_t size : {1, 200, 64, 65, 291}) chunks.read_chunk(size);
      expect_selection(chunks.run(), problem);
      expect_outputs<TypeParam>(chunks.run(), expected, problem);
      tokens.decode(spec.seqlen);
      expect_selection(tokens.run(), problem);
      expect_outputs<TypeParam>(tokens.run(), expected, problem);
    }
  });
}

}  // namespace
}  // namespace sparsek::test
