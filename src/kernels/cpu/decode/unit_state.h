// The state of one (batch row, KV head) during a decode step: what the new token changes in it (eq. 3-6, section 6) and
// which of its rows the token sees (eq. 7). Attention itself is elsewhere.
#pragma once
#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/decode/threshold.h"
#include "kernels/params.h"

namespace sparsek::cpu {

// Consecutive state rows that are attended in the same way.
struct Run {
  int32_t first_row, num_rows;
  bool is_far;   // with far rotary: logits from q_far and state_k. Otherwise from q and (with far rotary) ring_k
  bool is_slot;  // weighed by the gate
};

template <class Element, class Score>
struct UnitState {
  UnitState(const DecodeStepParams& p, int b, int h) : params(p), batch_row(b), kv_head(h) {
    const int64_t unit = int64_t{b} * p.num_kv_heads + h;
    const int64_t rows = int64_t{p.num_sinks} + p.window_size + p.topk;
    k = static_cast<Element*>(p.state_k) + unit * rows * p.head_dim;
    v = static_cast<Element*>(p.state_v) + unit * rows * p.head_dim;
    if (p.ring_k != nullptr) ring_k = static_cast<Element*>(p.ring_k) + unit * p.window_size * p.head_dim;
    slot_scores = static_cast<Score*>(p.slot_scores) + unit * p.topk;
    slot_positions = p.slot_positions + unit * p.topk;
    pool_scores = static_cast<Score*>(p.pool_scores) + unit * p.pool_size;
    if (p.ring_mass != nullptr) ring_mass = static_cast<Score*>(p.ring_mass) + unit * p.window_size;
    length = p.lengths[b];
    if (p.candidate_scores != nullptr) {
      candidate_score = static_cast<const Score*>(p.candidate_scores) + unit;
    } else {
      ring_score = static_cast<Score*>(p.ring_scores) + unit * p.window_size + new_row();
      new_score = static_cast<const Score*>(p.scores) + unit;
      candidate_score = ring_score;
    }
  }

  // The position of the key that leaves the window; it becomes a candidate when it is not a sink.
  int64_t leaving_position() const { return length - params.window_size; }
  bool has_candidate() const { return leaving_position() >= params.num_sinks; }
  // The ring row of the new token, and until then of the leaving key.
  int32_t new_row() const { return static_cast<int32_t>(length % params.window_size); }

  // Everything but the attention: candidate into pool and slots, then the new token over the leaving key's row.
  void take_token() {
    num_pooled = static_cast<int32_t>(std::clamp<int64_t>(leaving_position() - params.num_sinks, 0, params.pool_size));
    if (has_candidate()) take_candidate();
    const Element* new_k = at<Element>(params.k, params.k_stride_batch, params.k_stride_head);
    const Element* new_v = at<Element>(params.v, params.v_stride_batch, params.v_stride_head);
    if (ring_k != nullptr) {
      copy_row(ring_k, new_row(), new_k, 0);
      new_k = at<Element>(params.k_far, params.k_far_stride_batch, params.k_far_stride_head);
    }
    copy_row(k, params.num_sinks + new_row(), new_k, 0);
    copy_row(v, params.num_sinks + new_row(), new_v, 0);
    if (length < params.num_sinks) {
      copy_row(k, length, new_k, 0);
      copy_row(v, length, new_v, 0);
    }
    if (ring_mass != nullptr) ring_mass[new_row()] = 0;
    if (ring_score != nullptr) *ring_score = *new_score;
  }

  // Sinks outside the window and the window first, then the selected slots. With is_far false everywhere rows that
  // touch are one run.
  void visible_runs(std::vector<Run>& runs) const {
    runs.clear();
    const bool far_rotary = ring_k != nullptr;
    const auto num_sinks_outside =
        static_cast<int32_t>(std::clamp<int64_t>(leaving_position() + 1, 0, params.num_sinks));
    const auto num_window = static_cast<int32_t>(std::min<int64_t>(length + 1, params.window_size));
    if (!far_rotary && num_sinks_outside == params.num_sinks) {
      runs.push_back({0, num_sinks_outside + num_window, false, false});
    } else {
      if (num_sinks_outside > 0) runs.push_back({0, num_sinks_outside, far_rotary, false});
      runs.push_back({params.num_sinks, num_window, false, false});
    }
    const int32_t first_slot_row = params.num_sinks + params.window_size;
    for (int32_t slot = 0, end; slot < params.topk; slot = end + 1) {
      end = slot;
      while (end < params.topk && slot_positions[end] >= 0) ++end;
      if (end > slot) runs.push_back({first_slot_row + slot, end - slot, far_rotary, true});
    }
  }

  // Gate kSoft with more than topk candidates: weights[slot] = clamp(u - tau, 0, 1) and true. Otherwise every weight
  // is 1.
  bool slot_weights(Score* weights) const {
    if (params.gate == Gate::kHard || num_pooled <= params.topk) return false;
    const Score tau = static_cast<Score>(sorted_threshold(pool_scores, num_pooled, params.topk));
    for (int32_t slot = 0; slot < params.topk; ++slot) {
      const Score weight = slot_scores[slot] - tau;
      weights[slot] = weight < 0 ? Score{0} : weight > 1 ? Score{1} : weight;
    }
    return true;
  }

  // The older half of the window (eq. 1b) as at most two ranges of ring rows: visit(begin, end).
  template <class Visit>
  void older_half(const Visit& visit) const {
    const int64_t begin = std::max<int64_t>(0, leaving_position() + 1);
    const int64_t end = length - (params.window_size + 1) / 2 + 1;
    if (end <= begin) return;
    const int64_t first = begin % params.window_size, count = end - begin;
    const int64_t before_wrap = std::min(count, params.window_size - first);
    visit(first, first + before_wrap);
    if (count > before_wrap) visit(int64_t{0}, count - before_wrap);
  }

  template <class T>
  const T* at(const void* data, int64_t stride_batch, int64_t stride_head) const {
    return static_cast<const T*>(data) + batch_row * stride_batch + kv_head * stride_head;
  }

  const DecodeStepParams& params;
  int64_t batch_row, kv_head;
  Element *k, *v, *ring_k = nullptr;
  Score *slot_scores, *pool_scores, *ring_mass = nullptr;
  const Score *candidate_score, *new_score = nullptr;  // the new token's, with scores in the ring
  Score* ring_score = nullptr;                         // at new_row(), likewise
  int64_t* slot_positions;
  int64_t length;
  int32_t num_pooled = 0;  // pool entries in use

 private:
  void copy_row(Element* to, int64_t to_row, const Element* from, int64_t from_row) const {
    std::memcpy(to + to_row * params.head_dim, from + from_row * params.head_dim, sizeof(Element) * params.head_dim);
  }

  void take_candidate() {
    const Score u = *candidate_score;
    // It is the youngest: behind every equal score.
    const Score* place = std::partition_point(pool_scores, pool_scores + num_pooled, [u](Score x) { return x >= u; });
    const auto rank = static_cast<int32_t>(place - pool_scores);
    if (rank >= params.pool_size) return;
    const bool slots_full = num_pooled >= params.topk;
    num_pooled = std::min(num_pooled + 1, params.pool_size);
    std::memmove(pool_scores + rank + 1, pool_scores + rank, sizeof(Score) * (num_pooled - 1 - rank));
    pool_scores[rank] = u;
    if (rank >= params.topk) return;
    const int32_t slot = slots_full ? weakest_slot() : empty_slot();
    slot_scores[slot] = u;
    slot_positions[slot] = leaving_position();
    const int32_t slot_row = params.num_sinks + params.window_size + slot;
    copy_row(k, slot_row, k, params.num_sinks + new_row());
    copy_row(v, slot_row, v, params.num_sinks + new_row());
  }

  int32_t empty_slot() const {
    const auto is_empty = [](int64_t position) { return position < 0; };
    const int64_t* empty = std::find_if(slot_positions, slot_positions + params.topk, is_empty);
    assert(empty < slot_positions + params.topk);  // decode_step has counted them
    return static_cast<int32_t>(empty - slot_positions);
  }

  // Smallest score, among equals the largest position.
  int32_t weakest_slot() const {
    int32_t weakest = 0;
    for (int32_t slot = 1; slot < params.topk; ++slot) {
      if (slot_scores[slot] < slot_scores[weakest] ||
          (slot_scores[slot] == slot_scores[weakest] && slot_positions[slot] > slot_positions[weakest])) {
        weakest = slot;
      }
    }
    return weakest;
  }
};

}  // namespace sparsek::cpu
