// eq. 1b, 7-9 and section 5 of docs/math.md, query by query over the sets W_i, sinks, A_i and F_i.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "kernels/reference/reference.h"

namespace sparsek::reference {
namespace {

// eq. 7: one key that a query sees.
struct VisibleKey {
  int64_t key;
  double gate;       // g_ij
  bool is_far;       // outside the window: eq. 9 applies
  int64_t selected;  // its rank in A_i, or -1
};

std::vector<VisibleKey> visible_keys(const QuerySelection& selection, const Spec& spec) {
  const int64_t i = selection.query, begin = selection.document_begin;
  const int64_t window_begin = std::max(begin, i - spec.window_size + 1);
  std::vector<VisibleKey> keys;
  for (int64_t j = begin; j < std::min(begin + spec.num_sinks, window_begin); ++j) keys.push_back({j, 1.0, true, -1});
  for (int64_t rank = 0; rank < selection.num_selected; ++rank) {
    keys.push_back({selection.pool[rank], spec.gate == Gate::kSoft ? selection.weights[rank] : 1.0, true, rank});
  }
  for (int64_t j = window_begin; j <= i; ++j) keys.push_back({j, 1.0, false, -1});
  return keys;
}

// Addresses of [batch, seqlen, heads, head_dim].
struct Layout {
  const Spec& spec;
  int64_t q(int64_t b, int64_t t, int64_t head) const {
    return ((b * spec.seqlen + t) * spec.num_heads + head) * spec.head_dim;
  }
  int64_t kv(int64_t b, int64_t t, int64_t kv_head) const {
    return ((b * spec.seqlen + t) * spec.num_kv_heads + kv_head) * spec.head_dim;
  }
  int64_t score(int64_t b, int64_t t, int64_t kv_head) const {
    return (b * spec.seqlen + t) * spec.num_kv_heads + kv_head;
  }
  int64_t lse(int64_t b, int64_t head, int64_t t) const { return (b * spec.num_heads + head) * spec.seqlen + t; }
};

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

void add_scaled(double* target, double scale, const double* source, int64_t n) {
  for (int64_t d = 0; d < n; ++d) target[d] += scale * source[d];
}

// eq. 8-9: the probabilities a_ij of query i, head `head` over `keys`, and softmax_lse_i.
struct Probabilities {
  Values a;
  double lse;
};
Probabilities probabilities(const AttentionInputs& inputs, const Spec& spec, const std::vector<VisibleKey>& keys,
                            int64_t b, int64_t i, int64_t head, int64_t kv_head) {
  const Layout at{spec};
  const bool far_rotary = !inputs.q_far.empty();
  Values logits;
  double max_logit = -std::numeric_limits<double>::infinity();
  for (const VisibleKey& visible : keys) {
    const bool far = far_rotary && visible.is_far;
    const double* q = (far ? inputs.q_far : inputs.q).data() + at.q(b, i, head);
    const double* k = (far ? inputs.k_far : inputs.k).data() + at.kv(b, visible.key, kv_head);
    logits.push_back(spec.softmax_scale * dot(q, k, spec.head_dim));
    max_logit = std::max(max_logit, logits.back());
  }
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit - max_logit);
  const double lse = max_logit + std::log(sum);
  Values a;
  for (double logit : logits) a.push_back(std::exp(logit - lse));
  return {a, lse};
}

// Calls visit(b, kv_head, selection) for every query of every KV head.
template <class Visit>
void for_each_query_and_head(const Values& scores, const Spec& spec, const Visit& visit) {
  const Layout at{spec};
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t kv_head = 0; kv_head < spec.num_kv_heads; ++kv_head) {
      Values u(spec.seqlen);
      for (int64_t t = 0; t < spec.seqlen; ++t) u[t] = scores[at.score(b, t, kv_head)];
      for_each_query(u, spec, [&](const QuerySelection& selection) { visit(b, kv_head, selection); });
    }
  }
}

void check_sizes(const AttentionInputs& inputs, const Spec& spec) {
  [[maybe_unused]] const size_t tokens = static_cast<size_t>(spec.batch * spec.seqlen);
  assert(spec.num_heads % spec.num_kv_heads == 0);
  assert(inputs.q.size() == tokens * spec.num_heads * spec.head_dim);
  assert(inputs.k.size() == tokens * spec.num_kv_heads * spec.head_dim);
  assert(inputs.q_far.size() == (inputs.q_far.empty() ? 0 : inputs.q.size()));
  assert(inputs.k_far.size() == (inputs.q_far.empty() ? 0 : inputs.k.size()));
}

}  // namespace

AttentionOutputs attention_forward(const AttentionInputs& inputs, const Spec& spec) {
  check_sizes(inputs, spec);
  assert(inputs.v.size() == inputs.k.size());
  const Layout at{spec};
  const int64_t group = spec.num_heads / spec.num_kv_heads;
  AttentionOutputs result{Values(inputs.q.size(), 0.0), Values(spec.batch * spec.num_heads * spec.seqlen)};
  for_each_query_and_head(inputs.scores, spec, [&](int64_t b, int64_t kv_head, const QuerySelection& selection) {
    const int64_t i = selection.query;
    const std::vector<VisibleKey> keys = visible_keys(selection, spec);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Probabilities softmax = probabilities(inputs, spec, keys, b, i, head, kv_head);
      for (size_t n = 0; n < keys.size(); ++n) {
        add_scaled(&result.out[at.q(b, i, head)], softmax.a[n] * keys[n].gate,
                   &inputs.v[at.kv(b, keys[n].key, kv_head)], spec.head_dim);
      }
      result.softmax_lse[at.lse(b, head, i)] = softmax.lse;
    }
  });
  return result;
}

AttentionGradients attention_backward(const AttentionInputs& inputs, const Values& dout, const Values& dlse,
                                      const Spec& spec) {
  check_sizes(inputs, spec);
  assert(dout.size() == inputs.q.size());
  const Layout at{spec};
  const int64_t group = spec.num_heads / spec.num_kv_heads, head_dim = spec.head_dim;
  const bool far_rotary = !inputs.q_far.empty();
  AttentionGradients grad{Values(inputs.q.size(), 0.0),     Values(inputs.k.size(), 0.0),
                          Values(inputs.v.size(), 0.0),     Values(inputs.scores.size(), 0.0),
                          Values(inputs.q_far.size(), 0.0), Values(inputs.k_far.size(), 0.0)};
  for_each_query_and_head(inputs.scores, spec, [&](int64_t b, int64_t kv_head, const QuerySelection& selection) {
    const int64_t i = selection.query;
    const std::vector<VisibleKey> keys = visible_keys(selection, spec);
    Values h(selection.pool.size(), 0.0);  // eq. 10 by rank; 0 outside A_i
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Probabilities softmax = probabilities(inputs, spec, keys, b, i, head, kv_head);
      const double* dout_i = &dout[at.q(b, i, head)];
      double delta = 0;  // <do_i, out_i>
      Values dout_dot_v;
      for (size_t n = 0; n < keys.size(); ++n) {
        dout_dot_v.push_back(dot(dout_i, &inputs.v[at.kv(b, keys[n].key, kv_head)], head_dim));
        delta += softmax.a[n] * keys[n].gate * dout_dot_v[n];
      }
      const double dlse_i = dlse.empty() ? 0.0 : dlse[at.lse(b, head, i)];
      for (size_t n = 0; n < keys.size(); ++n) {
        const double a = softmax.a[n], gate = keys[n].gate;
        const bool far = far_rotary && keys[n].is_far;
        const int64_t q_at = at.q(b, i, head), k_at = at.kv(b, keys[n].key, kv_head);
        const double ds = a * (gate * dout_dot_v[n] - delta + dlse_i);
        add_scaled(&grad.dv[k_at], a * gate, dout_i, head_dim);
        add_scaled(&(far ? grad.dq_far : grad.dq)[q_at], ds * spec.softmax_scale,
                   &(far ? inputs.k_far : inputs.k)[k_at], head_dim);
        add_scaled(&(far ? grad.dk_far : grad.dk)[k_at], ds * spec.softmax_scale,
                   &(far ? inputs.q_far : inputs.q)[q_at], head_dim);
        if (keys[n].selected >= 0) h[keys[n].selected] += a * dout_dot_v[n];
      }
    }
    double sum_h = 0;
    int64_t size_f = 0;
    for (size_t rank = 0; rank < h.size(); ++rank) {
      if (selection.is_fractional(rank)) {
        sum_h += h[rank];
        ++size_f;
      }
    }
    for (size_t rank = 0; rank < h.size(); ++rank) {  // eq. 11
      if (selection.is_fractional(rank)) {
        grad.dscores[at.score(b, selection.pool[rank], kv_head)] += h[rank] - sum_h / static_cast<double>(size_f);
      }
    }
  });
  return grad;
}

WindowMass window_mass(const AttentionInputs& inputs, const Spec& spec) {
  check_sizes(inputs, spec);
  const Layout at{spec};
  const int64_t group = spec.num_heads / spec.num_kv_heads, w = spec.window_size;
  const size_t size = static_cast<size_t>(spec.batch * spec.seqlen * spec.num_kv_heads);
  WindowMass result{Values(size, 0.0), Values(size)};
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t kv_head = 0; kv_head < spec.num_kv_heads; ++kv_head) {
      for (const Document& document : documents(spec)) {
        std::vector<int64_t> num_queries(spec.seqlen, 0);
        for (int64_t i = document.begin; i < document.end; ++i) {
          const QuerySelection nothing{i, document.begin, 0, {}, {}, 0};
          const std::vector<VisibleKey> keys = visible_keys(nothing, spec);  // window and sinks only
          for (const VisibleKey& visible : keys) {
            if (i - visible.key >= (w + 1) / 2 && i - visible.key <= w - 1) ++num_queries[visible.key];
          }
          for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            const Probabilities softmax = probabilities(inputs, spec, keys, b, i, head, kv_head);
            for (size_t n = 0; n < keys.size(); ++n) {
              const int64_t age = i - keys[n].key;
              if (age >= (w + 1) / 2 && age <= w - 1) result.mass[at.score(b, keys[n].key, kv_head)] += softmax.a[n];
            }
          }
        }
        for (int64_t j = document.begin; j < document.end; ++j) {
          const int64_t here = at.score(b, j, kv_head);
          const double mean = num_queries[j] > 0 ? result.mass[here] / static_cast<double>(num_queries[j]) : 0.0;
          result.y[here] = std::log(1e-9 + mean);
        }
      }
    }
  }
  return result;
}

}  // namespace sparsek::reference
