// sparsek train and sparsek adapt: their arguments, and the calls.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "base/error.h"

namespace sparsek::cli {

// Keys of a configuration are no options of the command: main would put dashes before them.
template <class Action>
int with_keys(const Action& action) {
  try {
    return action();
  } catch (const UsageError& error) {
    throw UsageError(std::string(error.what()));
  }
}

struct TrainArguments {
  std::string config;                  // TOML file; empty: defaults
  std::vector<std::string> overrides;  // key=value
  bool print_config = false, resume = false;
  std::string checkpoint;
};
void add_train(CLI::App& app, TrainArguments& arguments);
int run_train(const TrainArguments& arguments);

// Options of `adapt` are names for keys of the same configuration.
struct AdaptArguments {
  TrainArguments train;
  std::string model, data, out;
  std::string part, loss;  // empty: as --config says, or scorer, and kl for that, next-token for others
};
void add_adapt(CLI::App& app, AdaptArguments& arguments);
int run_adapt(const AdaptArguments& arguments);

}  // namespace sparsek::cli
