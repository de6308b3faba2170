// sparsek generate: reads a document of any length, then continues it or answers about it.
#include "infer/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "cli/stopwatch.h"
#include "data/chat_template.h"
#include "infer/stop_matcher.h"

namespace sparsek::cli {
namespace {

// The text that a chat template puts before and after the user's message, whose own text is streamed between them as
// plain text: special tokens inside a document are not obeyed.
std::pair<std::string, std::string> chat_frame(const Tokenizer& tokenizer, const std::string& path,
                                               const std::string& system) {
  if (!tokenizer.chat_template()) throw_data("{}: --chat: expected a model with a chat template, found none", path);
  const ChatTemplate chat = ChatTemplate::recognise(*tokenizer.chat_template(), path);
  static constexpr std::string_view kMark = "\x01 document \x01";
  std::vector<ChatMessage> messages;
  if (!system.empty()) messages.push_back({"system", system});
  messages.push_back({"user", std::string(kMark)});
  const std::string text = chat.render(messages);
  const size_t mark = text.find(kMark);
  return {text.substr(0, mark), text.substr(mark + kMark.size())};
}

void append(std::vector<int32_t>& ids, const std::vector<int32_t>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

// Writes as long as somebody reads.
bool write_out(const std::string& text) {
  return text.empty() || (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0);
}

}  // namespace

int run_generate(const GenerateConfig& config) {
  if (config.max_tokens < 0) throw_usage("--max-tokens: expected 0 or more, found {}", config.max_tokens);
  if (!config.chat && !config.system.empty()) {
    throw_usage("--system: expected together with --chat, found without; add --chat or leave it out");
  }
  if (config.file.empty() && config.prompt.empty()) {
    throw_usage("generate: expected --prompt TEXT, --file PATH or both, found neither; add one");
  }
  const std::string path = resolve_model(config.model.model);
  const Tokenizer tokenizer = open_tokenizer(path);
  const auto [before, after] =
      config.chat ? chat_frame(tokenizer, path, config.system) : std::pair<std::string, std::string>{};
  std::optional<FileTokens> document;
  if (!config.file.empty()) document.emplace(tokenizer, config.file);
  Sampler sampler(config.sampling);
  StopMatcher stop(config.stop);
  std::vector<int32_t> ids_before = tokenizer.prefix(), ids_after;
  append(ids_before, tokenizer.encode(before, SpecialTokens::kParse));
  append(ids_after, tokenizer.encode(config.prompt, SpecialTokens::kAsText));
  append(ids_after, tokenizer.encode(after, SpecialTokens::kParse));
  const auto beside_document = static_cast<int64_t>(ids_before.size() + ids_after.size());
  std::optional<int64_t> expected_tokens = document ? document->expected_total() : 0;
  if (expected_tokens) *expected_tokens += beside_document + config.max_tokens;
  const model::Transformer model = open_model(config.model, path, expected_tokens);
  tokenizer.check_model_vocab(model.config().vocab_size, path);

  model::DecodeState state = model.new_state();
  const int64_t chunk_size = tokens_at_once(config.model);
  Prompt prompt(model, state, sampler, chunk_size);
  const Stopwatch read_time;
  {
    Progress progress(reading_on(model), "tokens", std::nullopt);
    // Chunk by chunk, so that Ctrl-C reaches a long prompt as it reaches a document.
    const auto read = [&](std::span<const int32_t> ids) {
      while (!ids.empty() && !interrupted()) {
        const size_t step = std::min(ids.size(), static_cast<size_t>(chunk_size));
        prompt.push(ids.first(step));
        ids = ids.subspan(step);
        const std::optional<int64_t> total = document ? document->estimated_total() : 0;
        if (total) progress.set_total(*total + beside_document);
        progress.update(prompt.tokens());
      }
    };
    read(ids_before);
    for (std::vector<int32_t> ids; document && !interrupted(); ids.clear()) {
      document->read(chunk_size, ids);
      if (ids.empty()) break;
      read(ids);
    }
    read(ids_after);
  }
  if (interrupted()) {
    fmt::print(stderr, "sparsek: interrupted after reading {} tokens\n", prompt.tokens());
    return kInterruptedExitCode;
  }
  if (prompt.tokens() == 0) {
    throw_data("{}: expected a prompt of at least one token, found an empty text",
               config.file.empty() ? "--prompt" : config.file);
  }
  const int64_t prompt_tokens = prompt.tokens();
  std::vector<float> logits = prompt.finish();
  const double read_seconds = read_time.seconds();

  TextStream stream(tokenizer);
  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += config.json ? piece : std::string();
    return config.json || write_out(piece);
  };
  bool writable = true;
  const Stopwatch generate_time;
  const int64_t generated =
      generate(model, state, sampler, std::move(logits), config.max_tokens,
               config.ignore_end ? std::span<const int32_t>() : std::span<const int32_t>(tokenizer.end_ids()),
               [&](int32_t token) {
                 writable = emit(stop.push(stream.push(token)));
                 return writable && !stop.stopped() && !interrupted();
               });
  const double generate_seconds = generate_time.seconds();
  if (writable) writable = emit(stop.push(stream.finish()));
  if (writable) writable = emit(stop.finish());  // what the line above left in it
  const char* reason = interrupted()                    ? "interrupted"
                       : stop.stopped()                 ? "stop sequence"
                       : generated == config.max_tokens ? "max tokens"
                                                        : "end token";
  const double read_rate = static_cast<double>(prompt_tokens) / read_seconds;
  const double generate_rate = generate_seconds > 0 ? static_cast<double>(generated) / generate_seconds : 0;
  if (config.json) {
    const nlohmann::ordered_json object{{"text", text},
                                        {"stop_reason", reason},
                                        {"prompt_tokens", prompt_tokens},
                                        {"generated_tokens", generated},
                                        {"prompt_tokens_per_second", read_rate},
                                        {"generated_tokens_per_second", generate_rate},
                                        {"state_bytes", state.size_in_bytes()},
                                        {"peak_rss_bytes", peak_rss_bytes()},
                                        {"attention", describe(model.attention())},
                                        {"device", model.device().str()}};
    print_json(object);
  } else {
    write_out("\n");
    const std::string on = model.device().is_cpu() ? "" : " on " + model.device().str();
    fmt::print(stderr, "read {} tokens at {:.0f}/s, wrote {} at {:.0f}/s{} ({}); state {}, peak memory {}\n",
               with_separators(prompt_tokens), read_rate, with_separators(generated), generate_rate, on, reason,
               human_bytes(static_cast<double>(state.size_in_bytes())),
               human_bytes(static_cast<double>(peak_rss_bytes())));
  }
  if (!writable) throw_data("standard output: cannot write the generated text (closed, or the disk is full)");
  return interrupted() ? kInterruptedExitCode : 0;
}

}  // namespace sparsek::cli
