// Score normalisation (eq. 1) along the sequence and its gradient, in double.
//
// Forward: Welford's update of (count, mean, M2) per key, then u. Backward: the same statistics are kept per position,
// and the gradients of mean and M2 are carried from the last key to the first, which is O(seqlen) although every u
// depends on all raw scores before it. Without timestep_norm mean and M2 pass through unchanged; only the count runs.
#include <cassert>
#include <cmath>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/select/finite.h"
#include "kernels/cpu/select/select.h"

namespace sparsek::cpu {
namespace {

constexpr double kEpsilon = 1e-5;
constexpr double kSlopePositions = 1024;  // the position slope is a score per this many positions

struct Statistics {
  double count = 0, mean = 0, m2 = 0;
  void add(double raw) {
    const double deviation = raw - mean;
    count += 1;
    mean += deviation / count;
    m2 += deviation * (raw - mean);
  }
  double inverse_std() const { return 1 / std::sqrt(m2 / count + kEpsilon); }
};

Statistics load(const double* stats, int64_t row) {
  return stats ? Statistics{stats[3 * row], stats[3 * row + 1], stats[3 * row + 2]} : Statistics{};
}
void store(const Statistics& statistics, double* stats, int64_t row) {
  stats[3 * row] = statistics.count;
  stats[3 * row + 1] = statistics.mean;
  stats[3 * row + 2] = statistics.m2;
}

int64_t num_documents(const NormaliseParams& params) {
  return params.cu_seqlens ? params.num_documents : 1;
}
int64_t document_begin(const NormaliseParams& params, int64_t d) {
  return params.cu_seqlens ? params.cu_seqlens[d] : 0;
}
int64_t document_end(const NormaliseParams& params, int64_t d) {
  return params.cu_seqlens ? params.cu_seqlens[d + 1] : params.seqlen;
}

// A (batch row, head) of a [batch, seq, head] tensor.
template <class T>
const T* column(const void* data, const Strides& strides, int64_t b, int64_t h) {
  return static_cast<const T*>(data) + b * strides.batch + h * strides.head;
}

template <class T>
double element(const void* data, int64_t i) {
  return double{static_cast<const T*>(data)[i]};
}

// False where a raw score is not finite.
template <class T>
bool normalise_row(const NormaliseParams& params, int64_t b, int64_t h) {
  const int64_t row = b * params.num_kv_heads + h;
  const double beta = element<T>(params.beta, h), gamma = element<T>(params.gamma, h);
  const double slope = element<T>(params.slope, h) / kSlopePositions;
  const T* const raw = column<T>(params.raw, params.raw_strides, b, h);
  T* const scores = static_cast<T*>(params.scores) + b * params.scores_strides.batch + h * params.scores_strides.head;
  Statistics statistics = load(params.stats_in, row);
  bool finite = true;
  for (int64_t d = 0; d < num_documents(params); ++d) {
    if (params.cu_seqlens) statistics = {};
    for (int64_t i = document_begin(params, d); i < document_end(params, d); ++i) {
      const double r = double{raw[i * params.raw_strides.seq]}, position = statistics.count;
      finite &= std::isfinite(r);
      double normalised = r;
      if (params.timestep_norm) {
        statistics.add(r);
        normalised = (r - statistics.mean) * statistics.inverse_std();
      } else {
        statistics.count += 1;
      }
      scores[i * params.scores_strides.seq] = static_cast<T>(beta + gamma * normalised + slope * position);
    }
  }
  store(statistics, params.stats, row);
  return finite;
}

template <class T>
void normalise_typed(const NormaliseParams& params) {
  std::vector<char> finite(int64_t{params.batch} * params.num_kv_heads);
  parallel_for(static_cast<int64_t>(finite.size()), [&](int64_t row) {
    finite[row] = normalise_row<T>(params, row / params.num_kv_heads, row % params.num_kv_heads);
  });
  for (const char row_is_finite : finite) {
    if (row_is_finite) continue;
    throw_not_finite("raw scores", static_cast<const T*>(params.raw), params.raw_strides, params.batch, params.seqlen,
                     params.num_kv_heads, [](int64_t, int64_t) { return true; });
  }
}

// What one (batch row, head) adds to the gradients of the head's parameters.
struct ParameterGradients {
  double beta = 0, gamma = 0, slope = 0;
};

template <class T>
class BackwardRow {
 public:
  BackwardRow(const NormaliseBwdParams& params, int64_t b, int64_t h)
      : params_(params),
        fwd_(params.fwd),
        raw_(column<T>(fwd_.raw, fwd_.raw_strides, b, h)),
        dscores_(column<T>(params.dscores, params.dscores_strides, b, h)),
        draw_(static_cast<T*>(params.draw) + b * fwd_.seqlen * fwd_.num_kv_heads + h),
        row_(b * fwd_.num_kv_heads + h),
        gamma_(element<T>(fwd_.gamma, h)) {}

  ParameterGradients run() {
    const Statistics dstats = load(params_.dstats, row_);
    dmean_ = dstats.mean;
    dm2_ = dstats.m2;
    for (int64_t d = num_documents(fwd_) - 1; d >= 0; --d) {
      run_document(document_begin(fwd_, d), document_end(fwd_, d));
      if (fwd_.cu_seqlens) dmean_ = dm2_ = 0;  // the document began with empty statistics
    }
    if (params_.dstats_in) store({0, dmean_, dm2_}, params_.dstats_in, row_);
    return gradients_;
  }

 private:
  void run_document(int64_t begin, int64_t end) {
    const Statistics start = fwd_.cu_seqlens ? Statistics{} : load(fwd_.stats_in, row_);
    if (fwd_.timestep_norm) {
      statistics_.resize(end - begin + 1);
      statistics_[0] = start;
      for (int64_t i = begin; i < end; ++i) {
        statistics_[i - begin + 1] = statistics_[i - begin];
        statistics_[i - begin + 1].add(raw(i));
      }
    }
    for (int64_t i = end - 1; i >= begin; --i) {
      const double du = double{dscores_[i * params_.dscores_strides.seq]};
      gradients_.beta += du;
      gradients_.slope += du * (start.count + static_cast<double>(i - begin)) / kSlopePositions;
      double draw = du * gamma_;
      if (fwd_.timestep_norm) {
        draw = step_back(raw(i), du, statistics_[i - begin], statistics_[i - begin + 1]);
      } else {
        gradients_.gamma += du * raw(i);
      }
      draw_[i * fwd_.num_kv_heads] = static_cast<T>(draw);
    }
  }

  // Through u = beta + gamma (r - mean) (M2 / count + eps)^-1/2, then through the update
  //   mean = before.mean + e / count,  M2 = before.M2 + e^2 (count - 1) / count,  e = r - before.mean.
  // Leaves the gradients of before.mean and before.M2 in dmean_, dm2_ and returns that of r.
  double step_back(double r, double du, const Statistics& before, const Statistics& after) {
    const double inverse_std = after.inverse_std(), centred = r - after.mean;
    gradients_.gamma += du * centred * inverse_std;
    double draw = du * gamma_ * inverse_std;
    dmean_ -= draw;
    dm2_ -= 0.5 * draw * centred * inverse_std * inverse_std / after.count;
    const double de = 2 * dm2_ * (r - before.mean) * (after.count - 1) / after.count;
    draw += dmean_ / after.count + de;
    dmean_ = dmean_ * (after.count - 1) / after.count - de;
    return draw;
  }

  double raw(int64_t i) const { return double{raw_[i * fwd_.raw_strides.seq]}; }

  const NormaliseBwdParams& params_;
  const NormaliseParams& fwd_;
  const T *raw_, *dscores_;
  T* draw_;
  int64_t row_;
  double gamma_;
  double dmean_ = 0, dm2_ = 0;
  std::vector<Statistics> statistics_;  // before position begin + i
  ParameterGradients gradients_;
};

template <class T>
void normalise_backward_typed(const NormaliseBwdParams& params) {
  const int64_t num_heads = params.fwd.num_kv_heads;
  std::vector<ParameterGradients> rows(params.fwd.batch * num_heads);
  parallel_for(static_cast<int64_t>(rows.size()),
               [&](int64_t row) { rows[row] = BackwardRow<T>(params, row / num_heads, row % num_heads).run(); });
  for (int64_t h = 0; h < num_heads; ++h) {
    ParameterGradients sum;
    for (int64_t b = 0; b < params.fwd.batch; ++b) {
      const ParameterGradients& row = rows[b * num_heads + h];
      sum = {sum.beta + row.beta, sum.gamma + row.gamma, sum.slope + row.slope};
    }
    static_cast<T*>(params.dbeta)[h] = static_cast<T>(sum.beta);
    static_cast<T*>(params.dgamma)[h] = static_cast<T>(sum.gamma);
    static_cast<T*>(params.dslope)[h] = static_cast<T>(sum.slope);
  }
}

// Packed documents begin with empty statistics, so they take none in.
void check(const NormaliseParams& params) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  assert(!params.cu_seqlens || (params.batch == 1 && !params.stats_in));
}

}  // namespace

void normalise_scores(const NormaliseParams& params) {
  check(params);
  params.dtype == DType::kF64 ? normalise_typed<double>(params) : normalise_typed<float>(params);
}

void normalise_scores_backward(const NormaliseBwdParams& params) {
  check(params.fwd);
  params.fwd.dtype == DType::kF64 ? normalise_backward_typed<double>(params) : normalise_backward_typed<float>(params);
}

}  // namespace sparsek::cpu
