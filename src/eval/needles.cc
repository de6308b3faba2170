#include "eval/needles.h"

#include <ATen/ops/argmax.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>

#include "base/error.h"
#include "data/quote.h"
#include "model/token_ids.h"

namespace sparsek::eval {
namespace {

// Subjects of the needles of kKeys; no two needles of a reading have the same.
constexpr std::array kWords = {
    "apple",  "bridge", "castle", "dolphin", "emerald", "forest", "garden", "hammer",  "iceberg", "jacket", "kitchen",
    "lemon",  "mirror", "napkin", "ocean",   "pencil",  "queen",  "rabbit", "silver",  "tiger",   "uncle",  "valley",
    "window", "yellow", "zebra",  "bottle",  "cotton",  "doctor", "eagle",  "feather", "guitar",  "honey",  "insect",
    "jungle", "knight", "lion",   "monkey",  "number",  "onion",  "planet", "quiver",  "river",   "spider", "tunnel",
    "vessel", "winter", "turtle", "rocket",  "pigeon",  "marble", "ladder", "island",  "helmet",  "ginger", "fossil",
    "eleven", "desert", "copper", "button",  "anchor",  "carpet", "dragon", "flower",  "barrel"};
constexpr int64_t kSearchBack = 128;  // tokens that a place may move back to the end of a sentence

struct Needle {
  int64_t depth = 0;  // which of options.depths
  std::vector<TokenId> sentence, question, answer;
};

// std's distributions differ between libraries; a remainder does not.
std::string digits(std::mt19937_64& random, int64_t count) {
  std::string text;
  for (int64_t i = 0; i < count; ++i) text += static_cast<char>('0' + random() % 10);
  return text;
}

// A question repeats the needle's words up to its value: a model without instruction tuning continues, it does not
// answer. A space that the tokenizer writes as a token of its own is the question's: whether a model would go on with a
// number at all is not what is asked.
Needle make_needle(const Tokenizer& tokenizer, const NeedleOptions& options, int64_t depth, const char* word,
                   std::mt19937_64& random) {
  const auto encode = [&](const std::string& text) { return tokenizer.encode(text, SpecialTokens::kAsText); };
  Needle needle;
  needle.depth = depth;
  const bool is_passkey = options.task == NeedleTask::kPasskey;
  const std::string value = digits(random, num_digits(options));
  if (is_passkey) {
    needle.sentence = encode(fmt::format("\n\nThe pass key is {}. Remember it. {} is the pass key.\n\n", value, value));
    needle.question = encode("\n\nWhat is the pass key? The pass key is");
  } else {
    needle.sentence = encode(fmt::format("\n\nThe special magic number for {} is {}.\n\n", word, value));
    needle.question = encode(
        fmt::format("\n\nWhat is the special magic number for {}? The special magic number for {} is", word, word));
  }
  needle.answer = encode(" " + value);
  while (needle.answer.size() > 1 && tokenizer.token_bytes(needle.answer.front()) == " ") {
    needle.question.push_back(needle.answer.front());
    needle.answer.erase(needle.answer.begin());
  }
  return needle;
}

// Where a sentence ends at or before `place`, or `place` where none ends nearby.
int64_t end_of_sentence(const Tokenizer& tokenizer, std::span<const TokenId> text, int64_t place) {
  for (int64_t at = place; at > std::max<int64_t>(place - kSearchBack, 0); --at) {
    const std::string_view bytes = tokenizer.token_bytes(text[at - 1]);
    if (bytes.ends_with('\n') || bytes.ends_with('.')) return at;
  }
  return place;
}

int64_t num_readings(const NeedleOptions& options) {
  return options.samples * (options.task == NeedleTask::kPasskey ? options.depths : 1);
}

}  // namespace

int64_t num_digits(const NeedleOptions& options) {
  if (options.digits > 0) return options.digits;
  return options.task == NeedleTask::kPasskey ? 5 : 7;
}

void check(const NeedleOptions& options) {
  const auto between = [](const char* field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) throw_field(field, "expected {} to {}, found {}", low, high, value);
  };
  between("depths", options.depths, 1, static_cast<int64_t>(kWords.size()));
  between("samples", options.samples, 1, 1'000'000);
  if (options.digits != 0) between("digits", options.digits, 1, 18);
  // A needle has up to 60 tokens, of seven digits 40; between them there is to be text.
  between("tokens", options.tokens, 80 * options.depths, int64_t{1} << 40);
}

NeedleTask parse_needle_task(const std::string& text) {
  if (text == "passkey") return NeedleTask::kPasskey;
  if (text == "keys") return NeedleTask::kKeys;
  throw_field("task", "expected passkey or keys, found {}", in_quotes(text));
}

int64_t haystack_tokens(const NeedleOptions& options) {
  return num_readings(options) * options.tokens;
}

NeedleResult needles(const model::Transformer& model, const Tokenizer& tokenizer, std::span<const TokenId> haystack,
                     const NeedleOptions& options, const std::function<bool(int64_t)>& on_progress) {
  check(options);
  if (const auto found = static_cast<int64_t>(haystack.size()); found < options.tokens) {
    throw_field("tokens", "expected at most {}, the tokens of the text, found {}", found, options.tokens);
  }
  const c10::InferenceMode inference;
  const auto start = std::chrono::steady_clock::now();
  NeedleResult result;
  result.depths.resize(options.depths);
  for (int64_t depth = 0; depth < options.depths; ++depth) {
    result.depths[depth].depth = (static_cast<double>(depth) + 0.5) / static_cast<double>(options.depths);
  }
  const auto finish = [&] {
    for (NeedleDepth& depth : result.depths) {
      if (depth.asked == 0) continue;
      depth.distance /= static_cast<double>(depth.asked);
      depth.answer_loss /= static_cast<double>(depth.asked);
      depth.token_accuracy /= static_cast<double>(depth.asked);
    }
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  };

  std::mt19937_64 random(options.seed);
  for (int64_t reading = 0; reading < num_readings(options); ++reading) {
    std::vector<const char*> words(kWords.begin(), kWords.end());
    for (size_t i = words.size() - 1; i > 0; --i) std::swap(words[i], words[random() % (i + 1)]);
    std::vector<Needle> inside;
    if (options.task == NeedleTask::kPasskey) {
      inside.push_back(make_needle(tokenizer, options, reading % options.depths, "", random));
    } else {
      for (int64_t depth = 0; depth < options.depths; ++depth) {
        inside.push_back(make_needle(tokenizer, options, depth, words[depth], random));
      }
    }

    // The text with the needles in it, options.tokens in all.
    std::vector<TokenId> ids = tokenizer.prefix();
    int64_t text_tokens = options.tokens - static_cast<int64_t>(ids.size());
    for (const Needle& needle : inside) text_tokens -= static_cast<int64_t>(needle.sentence.size());
    if (text_tokens < 0) {
      throw_field("tokens", "expected at least {} for {} needles as this tokenizer writes them, found {}",
                  options.tokens - text_tokens, inside.size(), options.tokens);
    }
    const int64_t spare = static_cast<int64_t>(haystack.size()) - text_tokens;
    const int64_t from = spare > 0 ? reading * options.tokens % (spare + 1) : 0;
    const std::span<const TokenId> text = haystack.subspan(from, text_tokens);
    std::vector<int64_t> ends;
    int64_t done = 0;
    for (const Needle& needle : inside) {
      const auto wanted = static_cast<int64_t>(result.depths[needle.depth].depth * static_cast<double>(text_tokens));
      const int64_t place = std::max(end_of_sentence(tokenizer, text, wanted), done);
      ids.insert(ids.end(), text.begin() + done, text.begin() + place);
      ids.insert(ids.end(), needle.sentence.begin(), needle.sentence.end());
      ends.push_back(static_cast<int64_t>(ids.size()));
      done = place;
    }
    ids.insert(ids.end(), text.begin() + done, text.end());

    model::DecodeState state = model.new_state();
    for (size_t first = 0; first < ids.size(); first += static_cast<size_t>(options.chunk_size)) {
      const size_t count = std::min(ids.size() - first, static_cast<size_t>(options.chunk_size));
      model.forward(model::as_tensor(std::span(ids).subspan(first, count)), state);
      result.tokens += static_cast<int64_t>(count);
      if (on_progress && !on_progress(result.tokens)) {
        result.complete = false;
        return finish();
      }
    }
    result.state_bytes = state.size_in_bytes();

    for (size_t i = 0; i < inside.size(); ++i) {
      const Needle& needle = inside[i];
      std::vector<TokenId> asked = needle.question;
      asked.insert(asked.end(), needle.answer.begin(), needle.answer.end() - 1);
      model::DecodeState copy = state.copy();
      const at::Tensor hidden = model.forward(model::as_tensor(asked), copy);
      const auto answers = static_cast<int64_t>(needle.answer.size());
      const at::Tensor rows = hidden.slice(0, hidden.size(0) - answers), targets = model::as_tensor(needle.answer);
      const std::vector<double> losses = model.losses(rows, targets);
      NeedleDepth& depth = result.depths[needle.depth];
      const at::Tensor hit = model.logits(rows).argmax(-1).eq(targets.to(at::kLong)).to(at::kLong).cpu();
      const int64_t hits = hit.sum().item<int64_t>();
      if (static_cast<int64_t>(result.answers.size()) < answers) {
        result.answers.resize(answers);
        result.tokens_right.resize(answers);
      }
      for (int64_t token = 0; token < answers; ++token) {
        result.answers[token] += 1;
        result.tokens_right[token] += hit.data_ptr<int64_t>()[token];
      }
      depth.right += hits == answers ? 1 : 0;
      depth.token_accuracy += static_cast<double>(hits) / static_cast<double>(answers);
      depth.answer_loss += std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(answers);
      depth.distance += static_cast<double>(static_cast<int64_t>(ids.size()) - ends[i]);
      depth.asked += 1;
    }
  }
  return finish();
}

}  // namespace sparsek::eval
