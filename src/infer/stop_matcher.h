// Finds stop sequences in text that arrives in pieces.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace sparsek {

// Holds back the end of the text while it could still become a stop sequence; what `push` returns may be shown at once.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> sequences);  // empty strings: UsageError
  // The text that is certainly not part of a stop sequence. After a match: what stood before it, and stopped() holds.
  std::string push(std::string_view piece);
  // What is still held back, when the text ends without a match.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> sequences_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace sparsek
