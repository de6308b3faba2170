// decode_step token by token = the reference on the whole sequence, at every position (eq. 12): outputs by row,
// selection and pool exactly, the mass of eq. 1b. On every instruction set, in every dtype.
#include "tests/kernels/decode/decoder.h"

namespace sparsek::test {
namespace {

class DecodeStep : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    if (static_cast<int>(GetParam()) > static_cast<int>(cpu::best_isa())) GTEST_SKIP() << "not on this processor";
    cpu::force_isa(GetParam());
  }
  void TearDown() override { cpu::force_isa(cpu::best_isa()); }

  // float64 does not depend on the instruction set.
  static void check_all_types(const Case& setup, uint64_t seed) {
    check_sequence<float>(setup, seed);
    check_sequence<BFloat16>(setup, seed);
    if (GetParam() == cpu::Isa::kPortable) check_sequence<double>(setup, seed);
  }
};

TEST_P(DecodeStep, EveryKindOfScores) {
  uint64_t seed = 10;
  for (const ScoreKind kind : kAllScoreKinds) {
    for (const Gate gate : {Gate::kSoft, Gate::kHard}) {
      for (const bool far_rotary : {false, true}) {
        Case setup;
        setup.kind = kind;
        setup.gate = gate;
        setup.far_rotary = far_rotary;
        check_all_types(setup, ++seed);
      }
    }
  }
}

TEST_P(DecodeStep, SizesOfTheState) {
  uint64_t seed = 200;
  for (const bool far_rotary : {false, true}) {
    for (const ScoreKind kind : {ScoreKind::kNormal, ScoreKind::kTies, ScoreKind::kRising}) {
      const auto check = [&](int32_t window_size, int32_t num_sinks, int32_t topk, int32_t pool_size) {
        Case setup;
        setup.window_size = window_size;
        setup.num_sinks = num_sinks;
        setup.topk = topk;
        setup.pool_size = pool_size;
        setup.far_rotary = far_rotary;
        setup.kind = kind;
        setup.seqlen = 60;
        check_all_types(setup, ++seed);
      };
      check(1, 0, 4, 9);  // only the own key in the window
      check(1, 3, 1, 2);
      check(2, 0, 1, 2);
      check(7, 0, 6, 7);   // no sinks, tight pool, odd window
      check(4, 9, 5, 20);  // more sinks than window
      check(5, 5, 5, 6);
      check(9, 70, 5, 6);    // every key is a sink
      check(70, 2, 5, 6);    // nothing leaves the window
      check(6, 2, 64, 90);   // topk beyond the length
      check(6, 2, 20, 300);  // the pool never fills
    }
  }
}

TEST_P(DecodeStep, HeadsAndHeadDims) {
  uint64_t seed = 400;
  const auto check = [&](int32_t num_heads, int32_t num_kv_heads, int32_t head_dim) {
    Case setup;
    setup.num_heads = num_heads;
    setup.num_kv_heads = num_kv_heads;
    setup.head_dim = head_dim;
    setup.seqlen = 40;
    setup.far_rotary = head_dim % 3 == 0;
    check_all_types(setup, ++seed);
  };
  for (const int32_t head_dim : {8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 136, 192, 256}) check(4, 2, head_dim);
  for (const int32_t group : {1, 2, 3, 4, 5, 7, 8, 9}) {
    check(group, 1, 24);
    check(3 * group, 3, 64);
  }
}

// Several tiles, full and partial, in window and slots; also the parallel paths.
TEST_P(DecodeStep, ManyTiles) {
  uint64_t seed = 600;
  for (const bool far_rotary : {false, true}) {
    for (const ScoreKind kind : {ScoreKind::kNormalSmall, ScoreKind::kRising}) {
      Case setup;
      setup.window_size = 137;
      setup.num_sinks = 4;
      setup.topk = 150;
      setup.pool_size = 170;
      setup.seqlen = 480;
      setup.num_heads = 6;
      setup.num_kv_heads = 3;
      setup.head_dim = 64;
      setup.far_rotary = far_rotary;
      setup.kind = kind;
      ++seed;
      check_sequence<float>(setup, seed);
      check_sequence<BFloat16>(setup, seed);
    }
  }
}

TEST_P(DecodeStep, BatchRowsOfDifferentLengths) {
  uint64_t seed = 800;
  for (const int32_t lag : {0, 1, 5, 17}) {
    for (const bool far_rotary : {false, true}) {
      Case setup;
      setup.batch = 4;
      setup.lag = lag;
      setup.far_rotary = far_rotary;
      check_all_types(setup, ++seed);
    }
  }
}

TEST_P(DecodeStep, WithoutMass) {
  Case setup;
  setup.with_mass = false;
  check_all_types(setup, 900);
}

INSTANTIATE_TEST_SUITE_P(Isas, DecodeStep, ::testing::Values(cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512),
                         [](const auto& info) { return std::string(cpu::name(info.param)); });

}  // namespace
}  // namespace sparsek::test
