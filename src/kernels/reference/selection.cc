// eq. 2-6 of docs/math.md and the intervals of its facts b and c, from the sets themselves.
#include <algorithm>
#include <cassert>
#include <limits>

#include "kernels/reference/reference.h"

namespace sparsek::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double rounded(double x, Precision precision) {
  return precision == Precision::kFloat32 ? static_cast<double>(static_cast<float>(x)) : x;
}

// The largest root of f(tau) = sum_j clamp(z_j - tau, 0, 1) - k for z in descending order, more than k of them.
// tau comes down from max z. f is linear between the points where an element enters F (at z_j) or moves on to S (at
// z_j - 1); the root is in the first piece at whose lower end f >= 0.
double largest_root(const Values& z, int64_t k) {
  const int64_t n = static_cast<int64_t>(z.size());
  int64_t in_s = 0, in_support = 0;  // S = z[0, in_s), F = z[in_s, in_support)
  double sum_f = 0;
  while (true) {
    const double enters_f = in_support < n ? z[in_support] : -kInfinity;
    const double enters_s = in_s < in_support ? z[in_s] - 1 : -kInfinity;
    const double next_tau = std::max(enters_f, enters_s);
    const double size_f = static_cast<double>(in_support - in_s);
    if (size_f > 0 && sum_f - size_f * next_tau + static_cast<double>(in_s) >= static_cast<double>(k)) break;
    if (enters_f >= enters_s) {
      sum_f += z[in_support++];
    } else {
      sum_f -= z[in_s++];
    }
    if (in_s == in_support) {
      if (in_s == k) return z[k - 1] - 1;  // F empty: f is 0 from here down to z[k], and rounding must not step over it
      sum_f = 0;
    }
  }
  sum_f = 0;
  for (int64_t j = in_s; j < in_support; ++j) sum_f += z[j];
  return (sum_f + static_cast<double>(in_s - k)) / static_cast<double>(in_support - in_s);
}

double weight(double u, double tau, Precision precision) {
  return std::clamp(rounded(u - tau, precision), 0.0, 1.0);  // tau -inf gives 1
}

}  // namespace

std::vector<Document> documents(const Spec& spec) {
  if (spec.cu_seqlens.empty()) return {{0, spec.seqlen}};
  assert(spec.batch == 1 && spec.cu_seqlens.front() == 0 && spec.cu_seqlens.back() == spec.seqlen);
  std::vector<Document> result;
  for (size_t d = 0; d + 1 < spec.cu_seqlens.size(); ++d) {
    result.push_back({spec.cu_seqlens[d], spec.cu_seqlens[d + 1]});
  }
  return result;
}

Projection sparsek_operator(const Values& z, int64_t k, Precision precision) {
  if (static_cast<int64_t>(z.size()) <= k) return {Values(z.size(), 1.0), -kInfinity};
  Values descending = z;
  std::sort(descending.begin(), descending.end(), std::greater<>());
  const double tau = rounded(largest_root(descending, k), precision);
  Values p;
  for (double z_j : z) p.push_back(weight(z_j, tau, precision));
  return {p, tau};
}

Values sparsek_operator_backward(const Values& z, int64_t k, Precision precision, const Values& dp) {
  const Values p = sparsek_operator(z, k, precision).p;
  double sum = 0;
  int64_t size_f = 0;
  for (size_t j = 0; j < z.size(); ++j) {
    if (p[j] > 0 && p[j] < 1) {
      sum += dp[j];
      ++size_f;
    }
  }
  Values dz(z.size(), 0.0);
  for (size_t j = 0; j < z.size(); ++j) {
    if (p[j] > 0 && p[j] < 1) dz[j] = dp[j] - sum / static_cast<double>(size_f);
  }
  return dz;
}

void for_each_query(const Values& u, const Spec& spec, const std::function<void(const QuerySelection&)>& visit) {
  for (const Document& document : documents(spec)) {
    Indices ranked;  // P_i by rank
    for (int64_t i = document.begin; i < document.end; ++i) {
      const int64_t leaving = i - spec.window_size;  // the key that becomes a candidate at query i
      if (leaving >= document.begin + spec.num_sinks) {
        // Arrivals have the largest index so far: behind every equal score.
        const auto place =
            std::upper_bound(ranked.begin(), ranked.end(), leaving, [&](int64_t a, int64_t b) { return u[a] > u[b]; });
        ranked.insert(place, leaving);
      }
      const int64_t num_candidates = static_cast<int64_t>(ranked.size());
      const int64_t pool = spec.pool_size == 0 ? num_candidates : std::min(num_candidates, spec.pool_size);
      QuerySelection selection{i, document.begin, -kInfinity, {ranked.begin(), ranked.begin() + pool}, {}, 0};
      selection.num_selected = std::min(pool, spec.topk);
      if (pool > spec.topk) {
        Values descending;
        for (int64_t j : selection.pool) descending.push_back(u[j]);
        selection.tau = rounded(largest_root(descending, spec.topk), spec.precision);
      }
      for (int64_t j : selection.pool) selection.weights.push_back(weight(u[j], selection.tau, spec.precision));
      visit(selection);
    }
  }
}

namespace {

// The queries at which a key is in a set, by definition one interval (checked by tests/kernels/reference).
struct Interval {
  int64_t begin = -1, end = -1;  // -1: not seen yet
};

// Follows one set (A or F) over the queries of a document.
class IntervalTracker {
 public:
  explicit IntervalTracker(int64_t seqlen) : intervals_(seqlen) {}
  void is_member(int64_t key, int64_t query) {
    Interval& interval = intervals_[key];
    if (interval.begin < 0) interval.begin = query;
    interval.end = query + 1;
  }
  const Interval& operator[](int64_t key) const { return intervals_[key]; }

 private:
  std::vector<Interval> intervals_;
};

}  // namespace

Selection select(const Values& scores, const Spec& spec) {
  const size_t size = static_cast<size_t>(spec.batch * spec.seqlen * spec.num_kv_heads);
  assert(scores.size() == size);
  Selection result{Values(size), Indices(size), Indices(size), Indices(size)};
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
      const auto at = [&](int64_t t) { return (b * spec.seqlen + t) * spec.num_kv_heads + h; };
      Values u(spec.seqlen);
      for (int64_t t = 0; t < spec.seqlen; ++t) u[t] = scores[at(t)];
      IntervalTracker selected(spec.seqlen), fractional(spec.seqlen);
      for_each_query(u, spec, [&](const QuerySelection& selection) {
        result.tau[at(selection.query)] = selection.tau;
        for (size_t rank = 0; rank < selection.pool.size(); ++rank) {
          const int64_t key = selection.pool[rank];
          if (static_cast<int64_t>(rank) < selection.num_selected) selected.is_member(key, selection.query);
          if (selection.is_fractional(rank)) fractional.is_member(key, selection.query);
        }
      });
      for (int64_t j = 0; j < spec.seqlen; ++j) {
        const int64_t arrival = j + spec.window_size;
        result.expiry[at(j)] = selected[j].end < 0 ? arrival : selected[j].end;
        result.frac_begin[at(j)] = fractional[j].begin < 0 ? arrival : fractional[j].begin;
        result.frac_end[at(j)] = fractional[j].end < 0 ? arrival : fractional[j].end;
      }
    }
  }
  return result;
}

}  // namespace sparsek::reference
