#include "kernels/cpu/attention/double_path.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace sparsek::cpu {
namespace {

// One (batch row, KV head): its rows, and what each query of it sees.
struct Lane {
  Lane(const AttentionFwdParams& p_, int32_t batch_, int32_t kv_head_)
      : p(p_),
        batch(batch_),
        kv_head(kv_head_),
        group_heads(p.num_heads / p.num_kv_heads),
        window_begin(p.window_begin + static_cast<int64_t>(batch) * p.seqlen_q) {
    const int64_t lane = static_cast<int64_t>(batch) * p.num_kv_heads + kv_head;
    far_begin = p.far_begin + lane * p.seqlen_k;
    far_end = p.far_end + lane * p.seqlen_k;
    scores = static_cast<const double*>(p.scores) + lane * p.seqlen_k;
    tau = static_cast<const double*>(p.tau) + lane * p.seqlen_q;
  }

  const double* row(const void* base, const Strides& strides, int64_t position, int64_t head) const {
    return static_cast<const double*>(base) + batch * strides.batch + position * strides.seq + head * strides.head;
  }
  const double* q(int64_t i, int64_t head, bool is_far) const {
    return is_far && p.q_far ? row(p.q_far, p.q_far_strides, i, head) : row(p.q, p.q_strides, i, head);
  }
  const double* k(int64_t r, bool is_far) const {
    return is_far && p.k_far ? row(p.k_far, p.k_far_strides, r, kv_head) : row(p.k, p.k_strides, r, kv_head);
  }
  const double* v(int64_t r) const { return row(p.v, p.v_strides, r, kv_head); }
  double gate(int64_t i, int64_t r, bool is_far) const {
    return is_far && p.gate == Gate::kSoft ? std::clamp(scores[r] - tau[i], 0.0, 1.0) : 1.0;
  }
  int64_t lse_index(int64_t i, int64_t head) const {
    return (static_cast<int64_t>(batch) * p.num_heads + head) * p.seqlen_q + i;
  }

  const AttentionFwdParams& p;
  int32_t batch, kv_head, group_heads;
  const int32_t *window_begin, *far_begin, *far_end;
  const double *scores, *tau;
};

struct VisibleRow {
  int32_t row;
  bool is_far;
};

// Calls visit(query, visible rows) for the queries in order.
template <class Visit>
void for_each_query(const Lane& lane, const Visit& visit) {
  std::vector<int32_t> far;
  std::vector<VisibleRow> visible;
  int32_t next = 0;
  for (int32_t i = 0; i < lane.p.seqlen_q; ++i) {
    for (; next < lane.p.seqlen_k && lane.far_begin[next] <= i; ++next) far.push_back(next);
    std::erase_if(far, [&](int32_t row) { return lane.far_end[row] <= i; });
    visible.clear();
    for (int32_t row : far) visible.push_back({row, true});
    for (int32_t row = lane.window_begin[i]; row <= lane.p.num_carried + i; ++row) visible.push_back({row, false});
    visit(i, visible);
  }
}

double dot(const double* a, const double* b, int32_t size) {
  double sum = 0;
  for (int32_t c = 0; c < size; ++c) sum += a[c] * b[c];
  return sum;
}

}  // namespace

void forward_double(const AttentionFwdParams& p) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
  for (int32_t batch = 0; batch < p.batch; ++batch) {
    for (int32_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
      const Lane lane(p, batch, kv_head);
      std::vector<double> logits;
      for_each_query(lane, [&](int32_t i, const std::vector<VisibleRow>& visible) {
        for (int32_t head = kv_head * lane.group_heads; head < (kv_head + 1) * lane.group_heads; ++head) {
          logits.clear();
          double maximum = -std::numeric_limits<double>::infinity(), sum = 0;
          for (const auto [row, is_far] : visible) {
            logits.push_back(p.softmax_scale * dot(lane.q(i, head, is_far), lane.k(row, is_far), p.head_dim));
            maximum = std::max(maximum, logits.back());
          }
          auto* out = const_cast<double*>(lane.row(p.out, p.out_strides, i, head));
          std::fill_n(out, p.head_dim, 0.0);
          for (double logit : logits) sum += std::exp(logit - maximum);
          for (size_t n = 0; n < visible.size(); ++n) {
            const auto [row, is_far] = visible[n];
            const double weight = std::exp(logits[n] - maximum) / sum * lane.gate(i, row, is_far);
            for (int32_t c = 0; c < p.head_dim; ++c) out[c] += weight * lane.v(row)[c];
          }
          static_cast<double*>(p.softmax_lse)[lane.lse_index(i, head)] =
              visible.empty() ? -std::numeric_limits<double>::infinity() : maximum + std::log(sum);
        }
      });
    }
  }
}

}  // namespace sparsek::cpu
