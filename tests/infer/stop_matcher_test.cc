#include "infer/stop_matcher.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "data/tokenizer.h"

namespace sparsek {
namespace {

TEST(StopMatcher, FindsASequenceAcrossPieces) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.push("one E"), "one ");
  EXPECT_EQ(matcher.push("N"), "");
  EXPECT_EQ(matcher.push("D two"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.finish(), "");
}

TEST(StopMatcher, LetsGoOfWhatWasNoMatch) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.push("aa"), "");
  EXPECT_EQ(matcher.push("a"), "a");  // "aa" may still begin it
  EXPECT_EQ(matcher.push("c"), "aac");
  EXPECT_EQ(matcher.push("a"), "");
  EXPECT_EQ(matcher.finish(), "a");
  EXPECT_FALSE(matcher.stopped());
}

TEST(StopMatcher, TheEarliestOfSeveralWins) {
  StopMatcher matcher({"xyz", "b"});
  EXPECT_EQ(matcher.push("abxyz"), "a");
}

TEST(StopMatcher, RefusesEmptySequences) {
  EXPECT_THROW(StopMatcher({""}), UsageError);
}

// As `generate` joins them: tokens end inside characters, and characters inside stop sequences.
class StopMatcherBehindTextStream : public testing::Test {
 protected:
  static constexpr int32_t kA = 0, kLead = 1, kTrail = 2, kE = 3, kEnd = 4;  // "a", the bytes of "\u00e9", "E", "ND"

  // What each token puts out, then what the end does.
  static std::vector<std::string> output(StopMatcher& stop, const std::vector<int32_t>& ids) {
    const Tokenizer tokenizer =
        Tokenizer::from_json(R"({"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","merges":["N D"],)"
                             R"("vocab":{"a":0,"\u00c3":1,"\u00a9":2,"E":3,"ND":4,"N":5,"D":6}}})",
                             "", "five tokens");
    TextStream stream(tokenizer);
    std::vector<std::string> pieces;
    for (const int32_t id : ids) pieces.push_back(stop.push(stream.push(id)));
    pieces.push_back(stop.push(stream.finish()));
    pieces.back() += stop.finish();
    return pieces;
  }
};

TEST_F(StopMatcherBehindTextStream, HoldsBackBytesAndBeginnings) {
  StopMatcher stop({"\u00e9END"});
  EXPECT_EQ(output(stop, {kA, kLead, kTrail, kE, kA, kLead, kTrail}),
            (std::vector<std::string>{"a", "", "", "", "\u00e9Ea", "", "", "\u00e9"}));
  EXPECT_FALSE(stop.stopped());
}

TEST_F(StopMatcherBehindTextStream, StopsAcrossTokensOfOneCharacter) {
  StopMatcher stop({"\u00e9END"});
  EXPECT_EQ(output(stop, {kA, kLead, kTrail, kE, kEnd, kA}), (std::vector<std::string>{"a", "", "", "", "", "", ""}));
  EXPECT_TRUE(stop.stopped());
}

TEST_F(StopMatcherBehindTextStream, LetsHalfACharacterOutAtTheEnd) {
  StopMatcher stop({"\u00e9"});
  EXPECT_EQ(output(stop, {kE, kLead}), (std::vector<std::string>{"E", "", "\xc3"}));
  EXPECT_FALSE(stop.stopped());
}

}  // namespace
}  // namespace sparsek
