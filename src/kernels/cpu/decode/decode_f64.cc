// The definition of section 6 in the order of its sentences; the state changes are shared with the vector path.
#include "kernels/cpu/decode/decode_f64.h"

#include <cmath>
#include <limits>

#include "kernels/cpu/decode/unit_state.h"

namespace sparsek::cpu {
namespace {

struct VisibleRow {
  int32_t row;  // of the state
  bool is_slot;
  double logit;
};

double dot(const double* x, const double* y, int32_t count) {
  double sum = 0;
  for (int32_t c = 0; c < count; ++c) sum += x[c] * y[c];
  return sum;
}

// Natural log of the sum of exp(logit) over the rows, with or without the slots.
double log_sum_exp(const std::vector<VisibleRow>& rows, bool with_slots) {
  double maximum = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const VisibleRow& row : rows) {
    if (with_slots || !row.is_slot) maximum = std::max(maximum, row.logit);
  }
  for (const VisibleRow& row : rows) {
    if (with_slots || !row.is_slot) sum += std::exp(row.logit - maximum);
  }
  return maximum + std::log(sum);
}

// One query head over the rows its KV head sees. weights: of the slots, or null.
void attend(const UnitState<double, double>& state, const std::vector<Run>& runs, const double* weights, int32_t head) {
  const DecodeStepParams& p = state.params;
  const double* q = static_cast<const double*>(p.q) + state.batch_row * p.q_stride_batch + head * p.q_stride_head;
  const double* q_far = static_cast<const double*>(p.q_far);
  if (q_far != nullptr) q_far += state.batch_row * p.q_far_stride_batch + head * p.q_far_stride_head;
  const int32_t first_slot_row = p.num_sinks + p.window_size;

  std::vector<VisibleRow> rows;
  for (const Run& run : runs) {
    for (int64_t row = run.first_row; row < run.first_row + run.num_rows; ++row) {
      const bool from_ring = state.ring_k != nullptr && !run.is_far;
      const double* k = from_ring ? state.ring_k + (row - p.num_sinks) * p.head_dim : state.k + row * p.head_dim;
      const double logit = dot(run.is_far ? q_far : q, k, p.head_dim) * p.softmax_scale;
      rows.push_back({static_cast<int32_t>(row), run.is_slot, logit});
    }
  }
  const int64_t out_row = state.batch_row * p.num_heads + head;
  double* out = static_cast<double*>(p.out) + out_row * p.head_dim;
  std::fill(out, out + p.head_dim, 0.0);
  const double lse = log_sum_exp(rows, true);
  for (const VisibleRow& row : rows) {
    double weight = std::exp(row.logit - lse);
    if (row.is_slot && weights != nullptr) weight *= weights[row.row - first_slot_row];
    for (int32_t c = 0; c < p.head_dim; ++c) out[c] += weight * state.v[int64_t{row.row} * p.head_dim + c];
  }
  if (p.softmax_lse != nullptr) static_cast<double*>(p.softmax_lse)[out_row] = lse;
  if (state.ring_mass == nullptr) return;
  const double window_lse = log_sum_exp(rows, false);
  state.older_half([&](int64_t begin, int64_t end) {
    for (const VisibleRow& row : rows) {
      const int64_t ring_row = row.row - p.num_sinks;
      if (ring_row >= begin && ring_row < end) state.ring_mass[ring_row] += std::exp(row.logit - window_lse);
    }
  });
}

}  // namespace

void decode_step_f64(const DecodeStepParams& p) {
  const int32_t group = p.num_heads / p.num_kv_heads;
  std::vector<Run> runs;
  std::vector<double> weights(p.topk);
  for (int32_t b = 0; b < p.batch; ++b) {
    for (int32_t h = 0; h < p.num_kv_heads; ++h) {
      UnitState<double, double> state(p, b, h);
      state.take_token();
      state.visible_runs(runs);
      const bool gated = state.slot_weights(weights.data());
      for (int32_t head = h * group; head < (h + 1) * group; ++head) {
        attend(state, runs, gated ? weights.data() : nullptr, head);
      }
    }
  }
}

}  // namespace sparsek::cpu
