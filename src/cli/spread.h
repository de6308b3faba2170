// What benchmarks say of several measurements of one thing.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace sparsek::cli {

struct Spread {
  double min = 0, median = 0, max = 0;
};
// Of at least one value; the median of an even number is the mean of the two in the middle.
Spread spread_of(std::vector<double> values);
// {"min": .., "median": .., "max": ..}, each name with `suffix` behind it, as "_ms".
nlohmann::ordered_json to_json(const Spread& spread, const std::string& suffix = "");

}  // namespace sparsek::cli
