// Can a model find what it read thousands of tokens ago? Sentences that nothing else predicts ("needles") are put into
// a text, the text is read once, and each is asked for behind it. An answer, which begins with the number's first
// digit, is right when every token of it is the most likely one, which is what greedy decoding would write there.
// Questions do not see each other: each starts from a copy of the state.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "model/transformer.h"

namespace sparsek::eval {

enum class NeedleTask : uint8_t {
  kPasskey,  // one needle a reading: a pass key, at one depth after the other
  kKeys,     // all needles in each reading, a word and a number each; every one is asked for
};
// Throws UsageError naming the field: passkey or keys.
NeedleTask parse_needle_task(const std::string& text);

struct NeedleOptions {
  NeedleTask task = NeedleTask::kKeys;
  int64_t tokens = 8192;  // of a reading, needles included, the question not
  int64_t depths = 10;    // places, evenly spaced: place d lies (d + 1/2) / depths into the text
  int64_t samples = 4;    // questions for each depth
  int64_t digits = 0;     // of a number: 1 to 18; 0: five of a pass key, seven of a key's number
  uint64_t seed = 1;      // of words and numbers
  int64_t chunk_size = 512;
};

int64_t num_digits(const NeedleOptions& options);  // options.digits, or the task's

// Throws UsageError unless every option is in its range; needles() does too, and asks for a text that is long enough.
void check(const NeedleOptions& options);

// Tokens of text that the readings take, one behind the other; a shorter text is read again from its begin, but no
// reading is longer than it.
int64_t haystack_tokens(const NeedleOptions& options);

struct NeedleDepth {
  double depth = 0;     // 0: begin of the text, 1: its end
  double distance = 0;  // mean of the tokens between the needle's end and the question
  int64_t asked = 0, right = 0;
  double token_accuracy = 0;  // mean share of an answer's tokens that are the most likely ones after those before them
  double answer_loss = 0;     // mean over questions of the answers' mean loss a token, nats: moves before right does
};

struct NeedleResult {
  std::vector<NeedleDepth> depths;
  int64_t tokens = 0;  // read
  // Tokens that are right by their place in the answer, over all questions: the first tells whether the needle is
  // found, later ones also whether what was found is read on. answers[i]: answers of more than i tokens.
  std::vector<int64_t> tokens_right, answers;
  double seconds = 0;
  int64_t state_bytes = 0;
  bool complete = true;  // false: on_progress asked to stop; depths hold what was asked until then
};

// `haystack`: tokens of a text. `on_progress(tokens read)` is called after each chunk; returning false stops there.
// Throws UsageError naming the option that is out of range, and one for a text shorter than a reading.
NeedleResult needles(const model::Transformer& model, const Tokenizer& tokenizer, std::span<const TokenId> haystack,
                     const NeedleOptions& options, const std::function<bool(int64_t)>& on_progress);

}  // namespace sparsek::eval
