// Numbers on the command line, and what is wrong with arguments in this program's words: one line that says what was
// expected and what was typed. CLI11 says it in two, and shows the number that a text was cut to.
#pragma once
#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sparsek::cli {

// Counts are at most this far from 0, so that sums of a few, and products with the sizes of a model's layer, are exact.
inline constexpr int64_t kMaxCount = int64_t{1} << 40;

// The number that `text` is, in full. Throws UsageError naming `option` and quoting `text`.
int64_t parse_count(const std::string& option, const std::string& text);
double parse_number(const std::string& option, const std::string& text);

// Options with such values. A value that is there already is the default that --help shows.
void add_count(CLI::App& command, const std::string& option, int64_t& target, const std::string& description);
void add_count(CLI::App& command, const std::string& option, std::optional<int64_t>& target,
               const std::string& description);
void add_counts(CLI::App& command, const std::string& option, std::vector<int64_t>& target,
                const std::string& description);
void add_number(CLI::App& command, const std::string& option, double& target, const std::string& description);
void add_number(CLI::App& command, const std::string& option, std::optional<double>& target,
                const std::string& description);
// A whole number from 0 to 2^64 - 1.
void add_seed(CLI::App& command, const std::string& option, uint64_t& target, const std::string& description);

// The command that was asked for, "bench model", and `app` itself when none was.
const CLI::App& chosen_command(const CLI::App& app);

// Throws `error`, which is neither help nor version, as UsageError.
[[noreturn]] void refuse(const CLI::App& app, const CLI::ParseError& error);

}  // namespace sparsek::cli
