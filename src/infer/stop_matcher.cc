#include "infer/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace sparsek {

StopMatcher::StopMatcher(std::vector<std::string> sequences) : sequences_(std::move(sequences)) {
  for (const std::string& sequence : sequences_) {
    if (sequence.empty()) throw_field("stop", "expected a text of at least one character, found an empty one");
  }
}

std::string StopMatcher::push(std::string_view piece) {
  if (stopped_) return {};
  held_ += piece;
  size_t match = std::string::npos;
  for (const std::string& sequence : sequences_) match = std::min(match, held_.find(sequence));
  if (match != std::string::npos) {
    stopped_ = true;
    held_.resize(match);
    return std::exchange(held_, {});
  }
  size_t keep = 0;  // the longest end of the text that begins a sequence
  for (const std::string& sequence : sequences_) {
    for (size_t n = std::min(sequence.size() - 1, held_.size()); n > keep; --n) {
      if (std::string_view(held_).ends_with(std::string_view(sequence).substr(0, n))) {
        keep = n;
        break;
      }
    }
  }
  std::string ready = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return ready;
}

std::string StopMatcher::finish() {
  return std::exchange(held_, {});
}

}  // namespace sparsek
