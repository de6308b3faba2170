#include "cli/arguments.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <limits>
#include <system_error>

#include "base/error.h"
#include "data/quote.h"

namespace sparsek::cli {
namespace {

// All of `text` as a number; nothing when it is none, goes on after one, or does not fit into T.
template <class T>
std::optional<T> whole_text_as(const std::string& text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end ? std::optional(value) : std::nullopt;
}

// `parse` turns what was typed into what `target` holds.
template <class T, class Parse>
CLI::Option* add(CLI::App& command, const std::string& option, T& target, const std::string& description,
                 const Parse& parse, const char* type_name) {
  return command
      .add_option_function<std::string>(
          option, [&target, option, parse](const std::string& text) { target = parse(option, text); }, description)
      ->type_name(type_name);
}

// "bench model"; empty for the program itself.
std::string path_of(const CLI::App& command) {
  if (command.get_parent() == nullptr) return {};
  const std::string parent = path_of(*command.get_parent());
  return parent.empty() ? command.get_name() : parent + " " + command.get_name();
}

std::string names_of_subcommands(const CLI::App& command) {
  std::string names;
  for (const CLI::App* subcommand : command.get_subcommands([](const CLI::App*) { return true; })) {
    names += (names.empty() ? "" : ", ") + subcommand->get_name();
  }
  return names;
}

}  // namespace

int64_t parse_count(const std::string& option, const std::string& text) {
  const std::optional<int64_t> value = whole_text_as<int64_t>(text);
  if (!value || *value > kMaxCount || *value < -kMaxCount) {
    throw_usage("{}: expected a whole number of at most {}, found {}", option, kMaxCount, in_quotes(text));
  }
  return *value;
}

double parse_number(const std::string& option, const std::string& text) {
  const std::optional<double> value = whole_text_as<double>(text);
  if (!value) throw_usage("{}: expected a number, found {}", option, in_quotes(text));
  return *value;
}

void add_count(CLI::App& command, const std::string& option, int64_t& target, const std::string& description) {
  add(command, option, target, description, parse_count, "INT")->default_str(fmt::format("{}", target));
}
void add_count(CLI::App& command, const std::string& option, std::optional<int64_t>& target,
               const std::string& description) {
  add(command, option, target, description, parse_count, "INT");
}
void add_counts(CLI::App& command, const std::string& option, std::vector<int64_t>& target,
                const std::string& description) {
  command
      .add_option_function<std::vector<std::string>>(
          option,
          [&target, option](const std::vector<std::string>& texts) {
            target.clear();
            for (const std::string& text : texts) target.push_back(parse_count(option, text));
          },
          description)
      ->type_name("INT")
      ->delimiter(',')
      ->default_str(fmt::format("{}", fmt::join(target, ",")));
}
void add_number(CLI::App& command, const std::string& option, double& target, const std::string& description) {
  add(command, option, target, description, parse_number, "FLOAT")->default_str(fmt::format("{}", target));
}
void add_number(CLI::App& command, const std::string& option, std::optional<double>& target,
                const std::string& description) {
  add(command, option, target, description, parse_number, "FLOAT");
}
void add_seed(CLI::App& command, const std::string& option, uint64_t& target, const std::string& description) {
  const auto parse = [](const std::string& name, const std::string& text) {
    const std::optional<uint64_t> value = whole_text_as<uint64_t>(text);
    if (value) return *value;
    throw_usage("{}: expected a whole number from 0 to {}, found {}", name, std::numeric_limits<uint64_t>::max(),
                in_quotes(text));
  };
  add(command, option, target, description, parse, "UINT")->default_str(fmt::format("{}", target));
}

const CLI::App& chosen_command(const CLI::App& app) {
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
  return *command;
}

void refuse(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App& command = chosen_command(app);
  const std::string path = path_of(command);
  const std::string prefix = path.empty() ? "" : path + ": ", help = path.empty() ? "--help" : path + " --help";
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  const std::string commands = names_of_subcommands(command);
  if (!commands.empty() && (unknown.empty() || !unknown.front().starts_with('-'))) {
    throw_usage("{}expected a command ({}), found {}; see `sparsek {}`", prefix, commands,
                unknown.empty() ? "none" : in_quotes(unknown.front()), help);
  }
  if (!unknown.empty()) {
    throw_usage("{}expected options and arguments that it has, found {}; see `sparsek {}`", prefix,
                in_quotes(unknown.front()), help);
  }
  for (const CLI::Option* option : command.get_options()) {
    if (!option->get_required() || option->count() > 0) continue;
    throw_usage("{}expected {} ({}), found none; see `sparsek {}`", prefix, option->get_name(),
                option->get_description(), help);
  }
  throw_usage("{}expected arguments as `sparsek {}` shows them, found a mistake: {}", prefix, help, error.what());
}

}  // namespace sparsek::cli
