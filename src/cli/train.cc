// sparsek train: a run from its configuration. sparsek adapt: the same with an existing model's defaults.
#include "cli/train.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/resources.h"
#include "cli/source.h"
#include "data/quote.h"
#include "data/shards/token_shards.h"
#include "train/trainer.h"

namespace sparsek::cli {
namespace {

std::string duration(double seconds) {
  const auto whole = static_cast<int64_t>(seconds);
  return fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string line_of(const train::StepReport& report) {
  std::string line = fmt::format("step {} / {}  loss {:.4f}", with_separators(report.step),
                                 with_separators(report.steps), report.loss);
  if (report.kl != 0) line += fmt::format("  kl {:.4f}", report.kl);
  if (report.validation) {
    line +=
        fmt::format("  validation {:.4f}, {:.1f}% right", report.validation->loss, 100 * report.validation->accuracy);
  }
  line += fmt::format("  {} tokens/s  {}  {} left", with_separators(static_cast<int64_t>(report.tokens_per_second)),
                      human_bytes(static_cast<double>(report.memory_bytes)), duration(report.seconds_left));
  if (report.skipped_steps > 0) line += fmt::format("  {} skipped", report.skipped_steps);
  return line;
}

// On a terminal one line that changes, and one that stays for each validation; elsewhere the lines that stay, and one
// every so many steps.
class Lines {
 public:
  explicit Lines(int64_t every) : every_(every) {}
  ~Lines() { clear(); }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;

  void operator()(const train::StepReport& report) {
    const bool stays = report.validation || report.step == report.steps;
    if (!is_terminal_ && !stays && report.step % every_ != 0) return;
    clear();
    std::fprintf(stderr, "%s%s", line_of(report).c_str(), is_terminal_ && !stays ? "" : "\n");
    std::fflush(stderr);
    is_drawn_ = is_terminal_ && !stays;
  }
  void notice(const std::string& text) {
    clear();
    fmt::print(stderr, "sparsek: {}\n", text);
  }

 private:
  void clear() {
    if (is_drawn_) std::fputs("\r\033[K", stderr);
    is_drawn_ = false;
  }
  int64_t every_;
  bool is_terminal_ = ::isatty(STDERR_FILENO) == 1, is_drawn_ = false;
};

// Ids of another tokenizer mean other tokens, and nothing later could tell. A folder that came without its tokenizer is
// not asked.
void check_tokenizers(const train::TrainConfig& config) {
  if (config.data.task != "shards") return;
  const TokenShards shards(config.data.train);
  if (!config.data.validation.empty()) {
    const TokenShards validation(config.data.validation);
    if (validation.tokenizer_fingerprint() != shards.tokenizer_fingerprint()) {
      throw_data("{}: expected shards of the tokenizer of {} (sha256 {}), found those of another (sha256 {})",
                 validation.path(), shards.path(), shards.tokenizer_fingerprint(), validation.tokenizer_fingerprint());
    }
  }
  for (const std::string& model : {config.model.base, config.loss.teacher}) {
    const bool has_none = std::filesystem::is_directory(model) && !std::filesystem::exists(model + "/tokenizer.json");
    if (!model.empty() && !has_none) shards.check_tokenizer(open_tokenizer_file(model), model);
  }
}

int run(train::TrainConfig config, const TrainArguments& arguments) {
  if (arguments.print_config) {
    fmt::print("{}", train::config_text(config));
    return 0;
  }
  if (arguments.resume && !arguments.checkpoint.empty()) {
    throw_usage("--checkpoint: expected without --resume, which takes the newest one");
  }
  for (std::string* model : {&config.model.base, &config.loss.teacher}) {
    if (!model->empty()) *model = resolve_model(*model);
  }
  check_tokenizers(config);
  Lines lines(config.run.log_every);
  train::TrainResult result;
  {
    const train::Observer observer{.on_step = [&](const train::StepReport& report) { lines(report); },
                                   .should_stop = [] { return interrupted(); },
                                   .notice = [&](const std::string& text) { lines.notice(text); }};
    result = train::train(config, {.newest = arguments.resume, .checkpoint = arguments.checkpoint}, observer);
  }
  if (!result.is_complete) {
    lines.notice(fmt::format("stopped after step {}; go on with --resume", result.steps));
    return 0;
  }
  fmt::print("steps {}  tokens {}  loss {:.4f}", result.steps, with_separators(result.tokens), result.loss);
  if (result.validation) {
    fmt::print("  validation {:.4f}, {:.2f}% right", result.validation->loss, 100 * result.validation->accuracy);
  }
  fmt::print("  skipped {}\nwritten to {}\n", result.skipped_steps, result.exported);
  return 0;
}

void add_common(CLI::App& command, TrainArguments& arguments) {
  command.add_flag("--print-config", arguments.print_config, "show the configuration as it was understood, and end");
  command.add_flag("--resume", arguments.resume, "go on after the newest checkpoint in run.folder");
  command.add_option("--checkpoint", arguments.checkpoint, "go on after this checkpoint's folder");
}

// Without a file: the scorer and its rates of examples/train/adapt_smollm2_scorer.toml (docs/adapting.md), with one
// budget in all layers. Steps, rows and validation are the trainer's defaults.
const std::vector<std::string> kRecipe = {
    "attention.topk=508",       "attention.window_size=512", "scorer.hidden=64",
    "scorer.delayed=false",     "scorer.slope=0.5",          "optimiser.scale_lr=2e-2",
    "optimiser.scorer_lr=1e-3", "optimiser.warmup_steps=20", "optimiser.weight_decay=0"};
constexpr const char* kRecipeWarmStart = "warm_start.steps=60";  // of new scorers: it would undo what trained ones know

}  // namespace

void add_train(CLI::App& app, TrainArguments& arguments) {
  CLI::App& command = *app.add_subcommand("train", "Train a model, from random weights or from an existing one");
  command.add_option("config", arguments.config, "TOML file (--print-config shows every key)");
  command.add_option("overrides", arguments.overrides, "key=value, as optimiser.lr=1e-3");
  add_common(command, arguments);
  command.footer(
      "Examples:\n"
      "  sparsek train examples/train/recall.toml\n"
      "  sparsek train examples/train/recall.toml run.folder=run/dense attention.kind=dense\n"
      "  sparsek train examples/train/recall.toml --resume");
}

int run_train(const TrainArguments& arguments) {
  TrainArguments given = arguments;
  if (given.config.find('=') != std::string::npos && !std::filesystem::exists(given.config)) {  // overrides alone
    given.overrides.insert(given.overrides.begin(), std::exchange(given.config, ""));
  }
  return with_keys([&] { return run(train::load_config(given.config, given.overrides), given); });
}

void add_adapt(CLI::App& app, AdaptArguments& arguments) {
  CLI::App& command = *app.add_subcommand("adapt", "Teach an existing model SparseK attention");
  command.add_option("--model", arguments.model, "GGUF file, Hugging Face folder, or smollm2")->required();
  command.add_option("--data", arguments.data, "folder of token shards (sparsek tokenize)");
  command.add_option("--train", arguments.part, "scorer (default: the base stays as it is), lora or full");
  command.add_option(
      "--loss", arguments.loss,
      "kl (to the dense model's own logits; default where scorers alone are learned), next-token or both");
  command.add_option("--out", arguments.out, "folder of the run (default: adapt-PART in the working folder)");
  command.add_option("--config", arguments.train.config, "TOML file to begin with, as `sparsek train` reads it");
  command.add_option("overrides", arguments.train.overrides,
                     "key=value, as attention.topk=128 or, for a GPU, run.device=cuda");
  add_common(command, arguments.train);
  command.footer(
      "Examples:\n"
      "  sparsek adapt --model smollm2 --data shards\n"
      "  sparsek adapt --model smollm2 --data shards --train lora "
      "scorer.adapter=adapt-scorer/model/adapter.safetensors\n"
      "  sparsek adapt --model smollm2 --data shards data.validation=held-out run.device=cuda loss.rows=8192");
}

int run_adapt(const AdaptArguments& arguments) {
  const bool has_file = !arguments.train.config.empty();  // whose keys stay where no option is given
  const auto given_or = [&](const std::string& given, const char* otherwise) {
    return given.empty() && !has_file ? otherwise : given;
  };
  const std::string part = given_or(arguments.part, "scorer");
  const std::string loss = given_or(arguments.loss, part == "scorer" ? "kl" : "next-token");
  if (!loss.empty() && loss != "next-token" && loss != "kl" && loss != "both") {
    throw_usage("--loss: expected next-token, kl or both, found {}", in_quotes(loss));
  }
  std::vector<std::string> overrides;
  if (!has_file) overrides = kRecipe;
  overrides.push_back("model.base=" + arguments.model);
  if (!part.empty()) overrides.push_back("trainable.part=" + part);
  if (!loss.empty()) {
    overrides.push_back(fmt::format("loss.next_token={}", loss == "kl" ? 0 : 1));
    overrides.push_back(fmt::format("loss.kl={}", loss == "next-token" ? 0 : 1));
  }
  if (!arguments.out.empty() || !has_file) {
    overrides.push_back("run.folder=" + (arguments.out.empty() ? "adapt-" + part : arguments.out));
  }
  if (!arguments.data.empty()) overrides.push_back("data.train=" + arguments.data);
  overrides.insert(overrides.end(), arguments.train.overrides.begin(), arguments.train.overrides.end());
  return with_keys([&] {
    train::TrainConfig config = train::load_config(arguments.train.config, overrides);
    if (!has_file && config.scorer.adapter.empty()) {
      overrides.insert(overrides.begin(), kRecipeWarmStart);  // what is given comes later, and wins
      config = train::load_config("", overrides);
    }
    return run(config, arguments.train);
  });
}

}  // namespace sparsek::cli
