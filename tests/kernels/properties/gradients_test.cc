// eq. 10-13: gradients of whole sequences, and of chunks added up, against the reference.
#include "tests/kernels/properties/gradient_limits.h"
#include "tests/kernels/properties/problems.h"
#include "tests/kernels/properties/run_streaming.h"

namespace sparsek::test {
namespace {

template <class Element>
class Gradients : public ::testing::Test {};
using Elements = ::testing::Types<float, double, BFloat16>;
TYPED_TEST_SUITE(Gradients, Elements);

TYPED_TEST(Gradients, ChunksAddUpToTheWhole) {
  for_each_isa<TypeParam>([] {
    for_each_problem<TypeParam>([](Problem problem) {
      const int64_t pool_size = problem.spec.pool_size;
      for (int64_t pool : {pool_size, int64_t{0}}) {
        problem.spec.pool_size = pool;
        const AttentionGradients expected =
            reference::attention_backward(problem.inputs, problem.dout, problem.dlse, problem.spec);
        {
          SCOPED_TRACE("whole");
          expect_gradients<TypeParam>(run_whole<TypeParam>(problem, Backward::kFast).grad, expected, problem);
        }
        if (std::is_same_v<TypeParam, BFloat16>) continue;  // chunks round their parts: only wholes are compared
        for (const Indices& sizes : chunkings(problem.spec, pool)) {
          SCOPED_TRACE(fmt::format("pool {} chunks {} .. {} ({})", pool, sizes.front(), sizes.back(), sizes.size()));
          StreamingRun<TypeParam> streaming(problem);
          for (int64_t size : sizes) streaming.read_chunk(size, Backward::kDeterministic);
          expect_gradients<TypeParam>(streaming.run().grad, expected, problem);
          if (::testing::Test::HasFailure()) return;
        }
      }
    });
  });
}

TYPED_TEST(Gradients, SeveralTilesAndThreads) {
  for_each_isa<TypeParam>([] {
    for (int64_t kv_heads : {int64_t{1}, int64_t{3}}) {
      Spec spec = spec_of(621, 140, 150, 4, 300);
      spec.batch = 1;
      spec.num_heads = 3 * kv_heads;
      spec.num_kv_heads = kv_heads;
      spec.head_dim = 64;
      const Problem problem = make_problem<TypeParam>(
          spec, kv_heads == 1 ? ScoreKind::kRising : ScoreKind::kNormalSmall, kv_heads == 3, 95);
      SCOPED_TRACE(problem.text);
      const AttentionGradients expected =
          reference::attention_backward(problem.inputs, problem.dout, problem.dlse, problem.spec);
      for (Backward backward : {Backward::kFast, Backward::kDeterministic}) {
        expect_gradients<TypeParam>(run_whole<TypeParam>(problem, backward).grad, expected, problem);
        if (std::is_same_v<TypeParam, BFloat16>) continue;
        StreamingRun<TypeParam> chunks(problem);
        for (int64_t size : {1, 200, 64, 65, 291}) chunks.read_chunk(size, backward);
        expect_gradients<TypeParam>(chunks.run().grad, expected, problem);
      }
    }
  });
}

}  // namespace
}  // namespace sparsek::test
