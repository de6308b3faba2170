// What decode_step promises about its state beyond the results: errors change nothing, slots may have any order and
// holes, the bits depend neither on the threads nor on the rest of the batch.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <omp.h>

#include "base/error.h"
#include "tests/kernels/decode/decoder.h"

namespace sparsek::test {
namespace {

template <class T>
bool same_bits(const Poisoned<T>& a, const Poisoned<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
template <class Element>
bool same_state(const Decoder<Element>& a, const Decoder<Element>& b) {
  return same_bits(a.state_k, b.state_k) && same_bits(a.state_v, b.state_v) && same_bits(a.ring_k, b.ring_k) &&
         same_bits(a.slot_scores, b.slot_scores) && same_bits(a.slot_positions, b.slot_positions) &&
         same_bits(a.pool_scores, b.pool_scores) && same_bits(a.ring_mass, b.ring_mass) &&
         same_bits(a.lengths, b.lengths);
}

TEST(DecodeState, ANonFiniteScoreIsRefusedBeforeAnythingChanges) {
  Case setup;
  setup.batch = 3;
  setup.far_rotary = true;
  const Sequence<float> sequence(setup, 31);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    Decoder<float> decoder(sequence);
    for (int t = 0; t < 30; ++t) decoder.step(0, 3);
    const Decoder<float> before = decoder;
    std::vector<float> candidates = decoder.candidates(0, 3);
    candidates[2 * setup.num_kv_heads + 1] = bad;
    try {
      decoder.step(0, 3, candidates);
      FAIL() << "no error for " << bad;
    } catch (const DataError& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr("batch row 2, position 22, head 1"));
    }
    EXPECT_TRUE(same_state(decoder, before));
    EXPECT_TRUE(same_bits(decoder.out, before.out));
  }
}

// Slots are searched and pool scores moved by what the length says they hold.
TEST(DecodeState, AStateThatDoesNotFitItsLengthIsRefusedBeforeAnythingChanges) {
  Case setup;
  setup.batch = 2;
  const Sequence<float> sequence(setup, 32);
  Decoder<float> filled(sequence);
  for (int t = 0; t < 40; ++t) filled.step(0, 2);
  const auto expect_refused = [&](Decoder<float> decoder, const std::string& message) {
    const Decoder<float> before = decoder;
    const std::vector<float> candidates(decoder.units(), 100.0f);  // above every other
    try {
      decoder.step(0, 2, candidates);
      ADD_FAILURE() << "no error";
    } catch (const DataError& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr(message));
    }
    EXPECT_TRUE(same_state(decoder, before));
    EXPECT_TRUE(decoder.guards_intact());
  };
  Decoder<float> rewound = filled, ahead(sequence), emptied = filled;
  rewound.lengths[1] = setup.window_size + setup.num_sinks;
  ahead.lengths[0] = ahead.lengths[1] = 40;
  for (int64_t i = 0; i < emptied.pool_scores.size(); ++i) {
    emptied.pool_scores[i] = -std::numeric_limits<float>::infinity();
  }
  expect_refused(rewound, fmt::format("must hold 0 selected keys, found {} in batch row 1, KV head 0", setup.topk));
  expect_refused(ahead, fmt::format("must hold {} selected keys, found 0 in batch row 0, KV head 0", setup.topk));
  expect_refused(emptied, "pool scores, found 0 in batch row 0, KV head 0");
}

// A chunk writes the slots in another order than decode_step would, and nothing says that empty ones come last.
TEST(DecodeState, SlotsInAnyOrderWithHoles) {
  for (const bool far_rotary : {false, true}) {
    for (const int64_t permute_at : {14, 18, 40}) {
      Case setup;
      setup.topk = 12;
      setup.pool_size = 20;
      setup.far_rotary = far_rotary;
      SCOPED_TRACE(describe(setup, 41));
      const Sequence<float> sequence(setup, 41);
      const Expected expected(sequence);
      Decoder<float> decoder(sequence);
      for (int64_t t = 0; t < setup.seqlen; ++t) {
        if (t == permute_at) {
          const Decoder<float> old = decoder;
          for (int64_t unit = 0; unit < decoder.units(); ++unit) {
            for (int64_t slot = 0; slot < setup.topk; ++slot) {
              const int64_t from = unit * setup.topk + slot, to = unit * setup.topk + (slot * 5 + 3) % setup.topk;
              decoder.slot_scores[to] = old.slot_scores[from];
              decoder.slot_positions[to] = old.slot_positions[from];
              const int64_t base = unit * decoder.state_rows() + setup.num_sinks + setup.window_size;
              const int64_t from_row = (base + slot) * setup.head_dim;
              const int64_t to_row = (base + (slot * 5 + 3) % setup.topk) * setup.head_dim;
              for (int64_t c = 0; c < setup.head_dim; ++c) {
                decoder.state_k[to_row + c] = old.state_k[from_row + c];
                decoder.state_v[to_row + c] = old.state_v[from_row + c];
              }
            }
          }
        }
        decoder.step(0, 1);
        ASSERT_NO_FATAL_FAILURE(expect_state(decoder, sequence, expected, 0, t));
      }
    }
  }
}

// 1, 2 and 6 units are shared between threads as tiles, as units, and unevenly.
TEST(DecodeState, BitsDoNotDependOnThreads) {
  const int max_threads = omp_get_max_threads();
  for (const int32_t num_kv_heads : {1, 2, 6}) {
    Case setup;
    setup.window_size = 300;
    setup.topk = 310;
    setup.pool_size = 400;
    setup.seqlen = 700;
    setup.num_heads = 3 * num_kv_heads;
    setup.num_kv_heads = num_kv_heads;
    setup.head_dim = 64;
    const Sequence<BFloat16> sequence(setup, 51);
    omp_set_num_threads(1);
    Decoder<BFloat16> wanted(sequence);
    std::vector<BFloat16> outputs;
    for (int64_t t = 0; t < setup.seqlen; ++t) {
      wanted.step(0, 1);
      for (int64_t i = 0; i < wanted.out.size(); ++i) outputs.push_back(wanted.out[i]);
    }
    for (const int threads : {2, 3, 5}) {
      omp_set_num_threads(threads);
      Decoder<BFloat16> decoder(sequence);
      for (int64_t t = 0; t < setup.seqlen; ++t) {
        decoder.step(0, 1);
        ASSERT_EQ(std::memcmp(decoder.out.data(), &outputs[t * decoder.out.size()], decoder.out.size() * 2), 0)
            << threads << " threads, position " << t;
      }
      EXPECT_TRUE(same_state(decoder, wanted)) << threads << " threads";
    }
  }
  omp_set_num_threads(max_threads);
}

TEST(DecodeState, BitsDoNotDependOnTheBatch) {
  Case setup;
  setup.batch = 5;
  setup.lag = 7;
  setup.window_size = 40;
  setup.topk = 50;
  setup.pool_size = 60;
  setup.seqlen = 200;
  setup.head_dim = 64;
  const Sequence<BFloat16> sequence(setup, 61);
  Decoder<BFloat16> together(sequence), alone(sequence);
  for (int32_t b = 0; b < setup.batch; ++b) {
    for (int64_t t = 0; t < b * setup.lag; ++t) {
      together.step(b, 1);
      alone.step(b, 1);
    }
  }
  for (int64_t t = 0; t + 4 * setup.lag < setup.seqlen; ++t) {
    together.step(0, setup.batch);
    for (int32_t b = setup.batch - 1; b >= 0; --b) alone.step(b, 1);
    ASSERT_TRUE(same_bits(together.out, alone.out)) << t;
  }
  EXPECT_TRUE(same_state(together, alone));
}

}  // namespace
}  // namespace sparsek::test
