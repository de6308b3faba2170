// From logits to the next token.
#pragma once
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace sparsek {

struct SamplingOptions {
  double temperature = 0;          // 0: greedy, the other options but repetition_penalty then have no effect
  int64_t top_k = 0;               // keep the k most likely tokens; 0: all
  double top_p = 1;                // keep the smallest set of most likely tokens whose probabilities reach top_p
  double min_p = 0;                // keep tokens at least min_p times as likely as the most likely one
  double repetition_penalty = 1;   // logits of recent tokens are divided (positive) or multiplied (negative) by it
  int64_t repetition_window = 64;  // how many recent tokens count
  uint64_t seed = 0;
};

// Throws UsageError naming the field when a value is out of range.
void check(const SamplingOptions& options);

// The same seed, options and logits give the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  // `logits` [vocab_size], finite (DataError otherwise: the model produced NaN); changed in place. The order is
  // penalty, temperature, top-k, top-p, min-p.
  int32_t sample(std::span<float> logits);
  // Counts `token` as recent for the repetition penalty: the prompt's last tokens as well as what was sampled.
  void observe(int32_t token);

 private:
  void penalise(std::span<float> logits);
  SamplingOptions options_;
  std::mt19937_64 random_;
  std::vector<int32_t> recent_;  // ring of the last repetition_window tokens
  size_t next_recent_ = 0;
  struct Candidate {
    float logit;
    int32_t token;
    double probability;
  };
  std::vector<Candidate> candidates_;
};

}  // namespace sparsek
