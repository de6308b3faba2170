#include "infer/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace sparsek {
namespace {

void expect(bool holds, const char* field, const char* range, double found) {
  if (!holds) throw_field(field, "expected {}, found {}", range, found);
}

}  // namespace

void check(const SamplingOptions& options) {
  // Each condition is written so that NaN fails it.
  expect(options.temperature >= 0 && options.temperature < 1e6, "temperature", "a number from 0 to below 1000000",
         options.temperature);
  expect(options.top_k >= 0, "top_k", "0 (off) or more", static_cast<double>(options.top_k));
  expect(options.top_p > 0 && options.top_p <= 1, "top_p", "a number in (0, 1]", options.top_p);
  expect(options.min_p >= 0 && options.min_p <= 1, "min_p", "a number in [0, 1]", options.min_p);
  // Far from 1 it leaves no order among the other logits, and infinities beyond.
  expect(options.repetition_penalty >= 0.01 && options.repetition_penalty <= 100, "repetition_penalty",
         "a number from 0.01 to 100", options.repetition_penalty);
  expect(options.repetition_window >= 0 && options.repetition_window <= 1 << 20, "repetition_window",
         "0 to 1048576 tokens", static_cast<double>(options.repetition_window));
}

Sampler::Sampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  check(options);
  recent_.reserve(static_cast<size_t>(options.repetition_window));
}

void Sampler::observe(int32_t token) {
  const auto window = static_cast<size_t>(options_.repetition_window);
  if (options_.repetition_penalty == 1 || window == 0) return;
  if (recent_.size() < window) {
    recent_.push_back(token);
  } else {
    recent_[next_recent_] = token;
  }
  next_recent_ = (next_recent_ + 1) % window;
}

void Sampler::penalise(std::span<float> logits) {
  std::vector<int32_t> once(recent_);  // a token is penalised once, however often it occurred
  std::sort(once.begin(), once.end());
  once.erase(std::unique(once.begin(), once.end()), once.end());
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  for (const int32_t token : once) {
    if (token < 0 || static_cast<size_t>(token) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

int32_t Sampler::sample(std::span<float> logits) {
  for (const float logit : logits) {
    if (!std::isfinite(logit))
      throw_data("expected finite logits, found {}: the weights are damaged; get the file again", logit);
  }
  if (options_.repetition_penalty != 1) penalise(logits);
  if (options_.temperature == 0) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  candidates_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i), 0};
  const auto more_likely = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), more_likely);
    candidates_.resize(static_cast<size_t>(options_.top_k));
  }
  std::sort(candidates_.begin(), candidates_.end(), more_likely);
  double sum = 0;
  for (Candidate& candidate : candidates_) {
    // The maximum is subtracted before exp.
    candidate.probability =
        std::exp((static_cast<double>(candidate.logit) - candidates_.front().logit) / options_.temperature);
    sum += candidate.probability;
  }
  double reached = 0;
  size_t kept = 0;
  while (kept < candidates_.size()) {
    if (kept > 0 && reached >= options_.top_p * sum) break;
    if (candidates_[kept].probability < options_.min_p) break;  // the first candidate has probability 1 before scaling
    reached += candidates_[kept++].probability;
  }
  // The top 53 bits as a number in [0, 1): the standard distributions differ between libraries.
  double point = static_cast<double>(random_() >> 11) * 0x1p-53 * reached;
  for (size_t i = 0; i < kept; ++i) {
    point -= candidates_[i].probability;
    if (point < 0) return candidates_[i].token;
  }
  return candidates_[kept - 1].token;
}

}  // namespace sparsek
