// The recall task: answers are where they should be, out of every window's reach, the same for the same seed; any
// position is found again, in chunks too.
#include "train/batches.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "train/token_loss.h"

namespace sparsek::train {
namespace {

constexpr RecallOptions kOptions{.batch = 3,
                                 .seqlen = 96,
                                 .num_pairs = 6,
                                 .num_keys = 9,
                                 .num_values = 5,
                                 .num_noise = 7,
                                 .gap = 20,
                                 .seed = 4,
                                 .split = Split::kTrain};

TEST(Recall, AsksEachPairOnce) {
  const auto source = make_recall(kOptions);
  EXPECT_EQ(source->vocab_size(), 21);
  for (int batch_index = 0; batch_index < 5; ++batch_index) {
    const Batch batch = source->next();
    EXPECT_EQ(batch.num_targets, 18);
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t* ids = batch.ids[row].const_data_ptr<int64_t>();
      const int64_t* targets = batch.targets[row].const_data_ptr<int64_t>();
      std::map<int64_t, int64_t> values;
      const int64_t questions = 96 - 12;
      for (int64_t t = 0; t < questions; ++t) {
        EXPECT_EQ(targets[t], kIgnored);
        if (ids[t] < 7) continue;
        ASSERT_LT(ids[t], 16) << "a value without its key";
        ASSERT_LT(t + 1, questions - 20) << "inside the gap";
        EXPECT_TRUE(values.emplace(ids[t], ids[t + 1]).second) << "a key twice";
        EXPECT_GE(ids[t + 1], 16);
        ++t;
      }
      ASSERT_EQ(values.size(), 6u);
      for (int64_t t = questions; t < 96; t += 2) {
        ASSERT_EQ(values.count(ids[t]), 1u);
        EXPECT_EQ(targets[t], values.at(ids[t]));
        EXPECT_EQ(ids[t + 1], targets[t]);
        EXPECT_EQ(targets[t + 1], kIgnored);
        values.erase(ids[t]);
      }
    }
  }
}

TEST(Recall, BySeedSplitAndPosition) {
  const auto a = make_recall(kOptions), b = make_recall(kOptions);
  RecallOptions other = kOptions;
  other.split = Split::kValidation;
  const auto c = make_recall(other);
  const Batch first = a->next();
  EXPECT_TRUE(first.ids.equal(b->next().ids));
  EXPECT_FALSE(first.ids.equal(c->next().ids));
  EXPECT_FALSE(first.ids.equal(a->next().ids));
  const std::string position = a->position();
  const Batch third = a->next();
  b->seek(position);
  EXPECT_TRUE(third.ids.equal(b->next().ids));
  EXPECT_THROW(b->seek("x"), std::runtime_error);
}

TEST(Chunks, CoverRowsAndAreFoundAgain) {
  const auto rows = make_recall(kOptions);
  const Batch whole = rows->next();
  for (const int64_t chunk : {40, 96, 100, 32}) {
    const auto chunks = cut_into_chunks(make_recall(kOptions), chunk);
    const auto again = cut_into_chunks(make_recall(kOptions), chunk);
    int64_t targets = 0;
    for (int64_t first = 0; first < 96; first += chunk) {
      again->seek(chunks->position());
      const Batch batch = chunks->next(), same = again->next();
      EXPECT_TRUE(batch.ids.equal(same.ids));
      EXPECT_EQ(batch.starts, same.starts);
      EXPECT_EQ(batch.starts[0], first == 0 ? 1 : 0);
      const int64_t count = std::min(chunk, 96 - first);
      EXPECT_TRUE(batch.ids.narrow(1, 0, count).equal(whole.ids.narrow(1, first, count)));
      EXPECT_TRUE(batch.targets.narrow(1, 0, count).equal(whole.targets.narrow(1, first, count)));
      EXPECT_EQ(batch.ids.size(1), chunk);
      targets += batch.num_targets;
    }
    EXPECT_EQ(targets, whole.num_targets);
    EXPECT_EQ(chunks->next().starts[0], 1);
  }
}

}  // namespace
}  // namespace sparsek::train
