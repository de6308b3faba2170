#include "infer/stop_matcher.h"

#include <gtest/gtest.h>

#include "base/error.h"

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

}  // namespace
}  // namespace sparsek
