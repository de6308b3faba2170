// eq. 1 of docs/math.md and its gradient: mean and population variance of every prefix, summed anew for each position.
#include <cassert>
#include <cmath>

#include "kernels/reference/reference.h"

namespace sparsek::reference {
namespace {

constexpr double kEpsilon = 1e-5;

// mean_j and var_j of raw[0..j], and the position slope's factor.
struct Statistics {
  double mean = 0, divisor = 1;  // divisor: sqrt(var + 1e-5)
};
Statistics statistics(const Values& r, int64_t j, bool timestep_norm) {
  if (!timestep_norm) return {};
  const double count = static_cast<double>(j + 1);
  double sum = 0, sum_of_squares = 0;
  for (int64_t t = 0; t <= j; ++t) sum += r[t];
  for (int64_t t = 0; t <= j; ++t) sum_of_squares += (r[t] - sum / count) * (r[t] - sum / count);
  return {sum / count, std::sqrt(sum_of_squares / count + kEpsilon)};
}

// Calls visit(address, r) for every document and KV head: r its raw scores, address(j) where r[j] lies in `raw`.
template <class Visit>
void for_each_series(const Values& raw, const Spec& spec, const Visit& visit) {
  assert(raw.size() == static_cast<size_t>(spec.batch * spec.seqlen * spec.num_kv_heads));
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t head = 0; head < spec.num_kv_heads; ++head) {
      for (const Document& document : documents(spec)) {
        const auto address = [&, b, head](int64_t j) {
          return (b * spec.seqlen + document.begin + j) * spec.num_kv_heads + head;
        };
        Values r(document.end - document.begin);
        for (size_t j = 0; j < r.size(); ++j) r[j] = raw[address(j)];
        visit(head, address, r);
      }
    }
  }
}

}  // namespace

Values normalise_scores(const Values& raw, const NormaliseOptions& options, const Spec& spec) {
  Values scores(raw.size());
  for_each_series(raw, spec, [&](int64_t head, const auto& address, const Values& r) {
    for (int64_t j = 0; j < static_cast<int64_t>(r.size()); ++j) {
      const Statistics stats = statistics(r, j, options.timestep_norm);
      scores[address(j)] = options.beta[head] + options.gamma[head] * (r[j] - stats.mean) / stats.divisor +
                           options.slope[head] * static_cast<double>(j) / 1024;
    }
  });
  return scores;
}

NormaliseGradients normalise_scores_backward(const Values& raw, const Values& dscores, const NormaliseOptions& options,
                                             const Spec& spec) {
  const size_t heads = static_cast<size_t>(spec.num_kv_heads);
  NormaliseGradients grad{Values(raw.size(), 0.0), Values(heads, 0.0), Values(heads, 0.0), Values(heads, 0.0)};
  for_each_series(raw, spec, [&](int64_t head, const auto& address, const Values& r) {
    for (int64_t j = 0; j < static_cast<int64_t>(r.size()); ++j) {
      const Statistics stats = statistics(r, j, options.timestep_norm);
      const double du = dscores[address(j)], centred = r[j] - stats.mean;
      grad.dbeta[head] += du;
      grad.dgamma[head] += du * centred / stats.divisor;
      grad.dslope[head] += du * static_cast<double>(j) / 1024;
      grad.draw[address(j)] += du * options.gamma[head] / stats.divisor;
      if (!options.timestep_norm) continue;
      // d mean_j / d r_t = 1 / count and d var_j / d r_t = 2 (r_t - mean_j) / count for every t <= j.
      const double count = static_cast<double>(j + 1);
      const double dmean = -du * options.gamma[head] / stats.divisor;
      const double dvar = -0.5 * du * options.gamma[head] * centred / std::pow(stats.divisor, 3);
      for (int64_t t = 0; t <= j; ++t) grad.draw[address(t)] += (dmean + dvar * 2 * (r[t] - stats.mean)) / count;
    }
  });
  return grad;
}

}  // namespace sparsek::reference
