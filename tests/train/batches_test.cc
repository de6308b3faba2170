// The recall task: answers are where they should be, out of every window's reach, the same for the same seed; any
// position is found again, in chunks too.
#include "train/batches.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "train/token_loss.h"

namespace sparsek::train {
namespace {

constexpr RecallOptions kOptions{.batch = 3,
                                 .seqlen = 96,
                                 .num_pairs = 6,
                                 .num_keys = 9,
                                 .num_values = 5,
                                 .num_noise = 7,
                                 .num_repeats = 0,
                                 .reach = 10,
                                 .gap = 20,
                                 .seed = 4,
                                 .split = Split::kTrain};

// Validation asks each pair once, training any pair at any time.
void expect_questions(Split split) {
  RecallOptions options = kOptions;
  options.split = split;
  const auto source = make_recall(options);
  EXPECT_EQ(source->vocab_size(), 21);
  const int64_t num_batches = split == Split::kTrain ? 400 : 5;
  int64_t num_asked = 0;  // different ones
  for (int64_t batch_index = 0; batch_index < num_batches; ++batch_index) {
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
      std::set<int64_t> asked;
      for (int64_t t = questions; t < 96; t += 2) {
        ASSERT_EQ(values.count(ids[t]), 1u);
        EXPECT_EQ(targets[t], values.at(ids[t]));
        EXPECT_EQ(ids[t + 1], targets[t]);
        EXPECT_EQ(targets[t + 1], kIgnored);
        num_asked += asked.insert(ids[t]).second ? 1 : 0;
      }
    }
  }
  // Six draws of six: 6 (1 - (5/6)^6) = 3.99 different ones; of five it would be 3.69.
  const double mean = static_cast<double>(num_asked) / static_cast<double>(3 * num_batches);
  if (split == Split::kValidation) {
    EXPECT_EQ(mean, 6);
  } else {
    EXPECT_NEAR(mean, 3.99, 0.12);  // six standard deviations
  }
}

TEST(Recall, ValidationAsksEachPairOnce) {
  expect_questions(Split::kValidation);
}

TEST(Recall, TrainingAsksPairsAtRandom) {
  expect_questions(Split::kTrain);
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

TEST(Recall, TellsPairsAgainNearbyAsPractice) {
  RecallOptions options = kOptions;
  options.seqlen = 256;
  options.num_repeats = 2;
  int64_t practice = 0;
  const auto source = make_recall(options);
  for (int batch_index = 0; batch_index < 5; ++batch_index) {
    const Batch batch = source->next();
    int64_t targets = 0;
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t* ids = batch.ids[row].const_data_ptr<int64_t>();
      const int64_t* asked = batch.targets[row].const_data_ptr<int64_t>();
      std::map<int64_t, int64_t> first;  // where a key is told first
      const int64_t questions = 256 - 12;
      for (int64_t t = 0; t < questions; ++t) {
        if (ids[t] < 7) {
          EXPECT_EQ(asked[t], kIgnored);
          continue;
        }
        ASSERT_LT(t + 1, questions - 20) << "inside the gap";
        const auto [it, is_first] = first.emplace(ids[t], t);
        EXPECT_EQ(ids[t + 1], ids[it->second + 1]) << "another value";
        EXPECT_EQ(asked[t], is_first ? kIgnored : ids[t + 1]);
        EXPECT_EQ(asked[t + 1], kIgnored);
        EXPECT_LE(t - it->second, options.reach);
        practice += is_first ? 0 : 1;
        targets += is_first ? 0 : 1;
        ++t;
      }
      EXPECT_EQ(first.size(), 6u);
    }
    EXPECT_EQ(batch.num_targets, targets + 18);
  }
  EXPECT_GT(practice, 5 * 3 * 6);  // of twice as many
  options.split = Split::kValidation;
  EXPECT_EQ(make_recall(options)->next().num_targets, 18);
}

// Rows of given lengths whose targets are their inputs' positions in their document, plus one.
class Counted final : public BatchSource {
 public:
  Counted(std::vector<int32_t> ends, std::vector<uint8_t> starts)
      : ends_(std::move(ends)), starts_(std::move(starts)), at_(starts_.size(), 0) {}
  Batch next() override {
    Batch batch;
    const int64_t rows = std::max<int64_t>(static_cast<int64_t>(starts_.size()), 1);
    batch.targets = at::empty({rows, 12}, at::kLong);
    batch.document_ends = ends_;
    batch.starts = starts_;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t* targets = batch.targets[row].mutable_data_ptr<int64_t>();
      int64_t position = starts_.empty() || starts_[row] != 0 ? 0 : at_[row];
      for (int64_t t = 0; t < 12; ++t) {
        if (std::find(ends_.begin(), ends_.end(), t) != ends_.end()) position = 0;
        targets[t] = ++position;
      }
      if (!starts_.empty()) at_[row] = position;
    }
    batch.ids = batch.targets;
    batch.num_targets = rows * 12;
    std::fill(starts_.begin(), starts_.end(), 0);
    return batch;
  }
  std::string position() const override { return "7"; }
  void seek(const std::string& position) override { EXPECT_EQ(position, "7"); }
  int64_t vocab_size() const override { return 13; }

 private:
  std::vector<int32_t> ends_;
  std::vector<uint8_t> starts_;
  std::vector<int64_t> at_;
};

void expect_from(const Batch& batch, const Batch& all, int64_t first, int64_t count) {
  EXPECT_TRUE(batch.targets.equal(all.targets.masked_fill(all.targets.lt(first), kIgnored)));
  EXPECT_EQ(batch.num_targets, count);
}

TEST(EarlyTargets, OfEachDocumentAreLeftOut) {
  // One document; three in a packed row, of 5, 1 and 6 tokens; two chunks, of which one row begins anew in the first.
  expect_from(
      without_early_targets(std::make_unique<Counted>(std::vector<int32_t>{}, std::vector<uint8_t>{}), 5)->next(),
      Counted({}, {}).next(), 5, 8);
  expect_from(
      without_early_targets(std::make_unique<Counted>(std::vector<int32_t>{5, 6, 12}, std::vector<uint8_t>{}), 3)
          ->next(),
      Counted({5, 6, 12}, {}).next(), 3, 7);
  const auto chunks =
      without_early_targets(std::make_unique<Counted>(std::vector<int32_t>{}, std::vector<uint8_t>{1, 1}), 15);
  Counted all({}, {1, 1});
  expect_from(chunks->next(), all.next(), 15, 0);
  const std::string position = chunks->position();
  const Batch second = all.next();
  expect_from(chunks->next(), second, 15, 20);
  chunks->seek(position);
  EXPECT_EQ(chunks->next().num_targets, 20) << "positions 13 to 24 again: it is the source that does not go back here";
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
