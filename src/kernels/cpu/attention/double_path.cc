#include "kernels/cpu/attention/double_path.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/attention/score_gradient.h"
#include "kernels/cpu/parallel.h"

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
    if (!p.scores) return;  // window_mass: no gates
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
  const double *scores = nullptr, *tau = nullptr;
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
  parallel_for(int64_t{p.batch} * p.num_kv_heads, [&](int64_t unit) {
    const auto batch = static_cast<int32_t>(unit / p.num_kv_heads);
    const auto kv_head = static_cast<int32_t>(unit % p.num_kv_heads);
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
  });
}

void backward_double(const AttentionBwdParams& params) {
  const AttentionFwdParams& p = params.fwd;
  const int64_t dim = p.head_dim, key_size = static_cast<int64_t>(p.batch) * p.seqlen_k * p.num_kv_heads * dim;
  const int64_t query_size = static_cast<int64_t>(p.batch) * p.seqlen_q * p.num_heads * dim;
  for (void* gradient : {params.dk, params.dv, params.dk_far}) {
    if (gradient) std::fill_n(static_cast<double*>(gradient), key_size, 0.0);
  }
  for (void* gradient : {params.dq, params.dq_far}) {
    if (gradient) std::fill_n(static_cast<double*>(gradient), query_size, 0.0);
  }
  parallel_for(int64_t{p.batch} * p.num_kv_heads, [&](int64_t unit) {
    const auto batch = static_cast<int32_t>(unit / p.num_kv_heads);
    const auto kv_head = static_cast<int32_t>(unit % p.num_kv_heads);
    const Lane lane(p, batch, kv_head);
    const int64_t lane_index = static_cast<int64_t>(batch) * p.num_kv_heads + kv_head;
    const int64_t num_score_rows = static_cast<int64_t>(params.num_pool_rows) + p.seqlen_k;
    const int32_t* frac_begin = params.frac_begin + lane_index * num_score_rows;
    const int32_t* frac_end = params.frac_end + lane_index * num_score_rows;
    std::vector<double> h_sums(p.seqlen_q, 0.0), row_h(p.seqlen_k, 0.0);
    const auto query_at = [&](int64_t i, int64_t head) {
      return ((static_cast<int64_t>(batch) * p.seqlen_q + i) * p.num_heads + head) * dim;
    };
    const auto key_at = [&](int64_t r) {
      return ((static_cast<int64_t>(batch) * p.seqlen_k + r) * p.num_kv_heads + kv_head) * dim;
    };
    for_each_query(lane, [&](int32_t i, const std::vector<VisibleRow>& visible) {
      for (int32_t head = kv_head * lane.group_heads; head < (kv_head + 1) * lane.group_heads; ++head) {
        const double lse = static_cast<const double*>(p.softmax_lse)[lane.lse_index(i, head)];
        const double dlse = params.dlse ? static_cast<const double*>(params.dlse)[lane.lse_index(i, head)] : 0.0;
        const double* dout = lane.row(params.dout, params.dout_strides, i, head);
        const double delta = dot(dout, lane.row(p.out, p.out_strides, i, head), p.head_dim);
        for (const auto [row, is_far] : visible) {
          const double *q = lane.q(i, head, is_far), *k = lane.k(row, is_far);
          const double weight = std::exp(p.softmax_scale * dot(q, k, p.head_dim) - lse);
          const double dweight = dot(dout, lane.v(row), p.head_dim), gate = lane.gate(i, row, is_far);
          const double dlogit = p.softmax_scale * weight * (gate * dweight - delta + dlse);
          auto* dq = static_cast<double*>(is_far && p.q_far ? params.dq_far : params.dq) + query_at(i, head);
          auto* dk = static_cast<double*>(is_far && p.k_far ? params.dk_far : params.dk) + key_at(row);
          auto* dv = static_cast<double*>(params.dv) + key_at(row);
          for (int64_t c = 0; c < dim; ++c) {
            dq[c] += dlogit * k[c];
            dk[c] += dlogit * q[c];
            dv[c] += weight * gate * dout[c];
          }
          const int64_t score_row = params.num_pool_rows + row;
          if (is_far && frac_begin[score_row] <= i && i < frac_end[score_row]) {
            h_sums[i] += weight * dweight;
            row_h[row] += weight * dweight;
          }
        }
      }
    });
    score_gradient(params.num_pool_rows, p.seqlen_k, p.seqlen_q, frac_begin, frac_end, h_sums.data(), row_h.data(),
                   static_cast<double*>(params.dscores) + lane_index * num_score_rows);
  });
}

void window_mass_double(const WindowMassParams& params) {
  parallel_for(int64_t{params.batch} * params.num_kv_heads, [&](int64_t unit) {
    const auto batch = static_cast<int32_t>(unit / params.num_kv_heads);
    const auto kv_head = static_cast<int32_t>(unit % params.num_kv_heads);
    AttentionFwdParams p{};  // as attention over the same rows; all heads share the far rows
    p.q = params.q;
    p.k = params.k;
    p.q_far = params.q_far;
    p.k_far = params.k_far;
    p.q_strides = params.q_strides;
    p.k_strides = params.k_strides;
    p.q_far_strides = params.q_far_strides;
    p.k_far_strides = params.k_far_strides;
    p.window_begin = params.window_begin;
    p.far_begin = params.far_begin;
    p.far_end = params.far_end;
    p.seqlen_q = params.seqlen_q;
    p.seqlen_k = params.seqlen_k;
    p.num_carried = params.num_carried;
    p.num_heads = params.num_heads;
    p.num_kv_heads = params.num_kv_heads;
    Lane lane(p, batch, kv_head);
    lane.far_begin = params.far_begin + static_cast<int64_t>(batch) * params.seqlen_k;
    lane.far_end = params.far_end + static_cast<int64_t>(batch) * params.seqlen_k;
    const int64_t first = (static_cast<int64_t>(batch) * params.num_kv_heads + kv_head) * params.seqlen_k;
    auto* mass = static_cast<double*>(params.mass) + first;
    const auto* mass_in = static_cast<const double*>(params.mass_in);
    for (int32_t r = 0; r < params.seqlen_k; ++r) mass[r] = mass_in ? mass_in[first + r] : 0.0;
    for_each_query(lane, [&](int32_t i, const std::vector<VisibleRow>& visible) {
      for (int32_t head = kv_head * lane.group_heads; head < (kv_head + 1) * lane.group_heads; ++head) {
        std::vector<double> logits;
        for (const auto [row, is_far] : visible) {
          logits.push_back(params.softmax_scale * dot(lane.q(i, head, is_far), lane.k(row, is_far), params.head_dim));
        }
        const double maximum = *std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (double logit : logits) sum += std::exp(logit - maximum);
        for (size_t n = 0; n < visible.size(); ++n) {
          const int32_t age = params.num_carried + i - visible[n].row;
          if (visible[n].is_far || age < (params.window_size + 1) / 2) continue;
          mass[visible[n].row] += std::exp(logits[n] - maximum) / sum;
        }
      }
    });
  });
}

}  // namespace sparsek::cpu
