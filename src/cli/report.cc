#include "cli/report.h"

#include <fmt/format.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace sparsek::cli {

void print_json(const nlohmann::ordered_json& object, int indent) {
  fmt::print("{}\n", object.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace));
}

void check_output() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw_data("standard output: cannot write the result (closed, or the disk is full)");
  }
}

}  // namespace sparsek::cli
