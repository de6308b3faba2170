#include "cli/spread.h"

#include <algorithm>
#include <cassert>
#include <nlohmann/json.hpp>

namespace sparsek::cli {

Spread spread_of(std::vector<double> values) {
  assert(!values.empty());
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median = values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {values.front(), median, values.back()};
}

nlohmann::ordered_json to_json(const Spread& spread, const std::string& suffix) {
  return {{"min" + suffix, spread.min}, {"median" + suffix, spread.median}, {"max" + suffix, spread.max}};
}

}  // namespace sparsek::cli
