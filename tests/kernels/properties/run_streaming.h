// The same problem in pieces: chunks through select_chunk, chunk_visibility and attention with carried rows, and tokens
// through decode_step. One state serves both, so a run may change from chunks to tokens.
//
// The state here keeps, for every row, only the position it came from: rows are gathered from the whole tensors, and
// what a kernel must not read is NaN. Gradients of carried rows are added to the positions they came from; by eq. 13
// the sum over the chunks is the whole sequence's gradient.
#pragma once
#include <algorithm>
#include <numeric>

#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/decode/decode_step.h"
#include "kernels/cpu/select/chunk_visibility.h"
#include "kernels/cpu/select/select.h"
#include "tests/kernels/properties/run_whole.h"

namespace sparsek::test {

template <class Element>
class StreamingRun {
 public:
  using Score = ScoreOf<Element>;

  explicit StreamingRun(const Problem& problem)
      : problem_(problem),
        spec_(problem.spec),
        in_(problem),
        far_rotary_(!in_.q_far.empty()),
        units_(spec_.batch * spec_.num_kv_heads),
        state_rows_(spec_.num_sinks + spec_.window_size + spec_.topk),
        pool_capacity_(spec_.pool_size),
        row_position_(units_ * state_rows_, -1),
        slot_positions_(units_ * spec_.topk, -1),
        slot_scores_(units_ * spec_.topk, kUnused),
        pool_scores_(units_ * pool_capacity_, kUnused),
        pool_position_(units_ * pool_capacity_, -1) {
    run_.out.resize(in_.q.size());
    run_.softmax_lse.resize(spec_.batch * spec_.num_heads * spec_.seqlen);
    run_.tau.resize(in_.scores.size());
    run_.mass.resize(in_.scores.size());
    const AttentionInputs& inputs = problem.inputs;
    run_.grad = {Values(inputs.q.size()),      Values(inputs.k.size()),     Values(inputs.v.size()),
                 Values(inputs.scores.size()), Values(inputs.q_far.size()), Values(inputs.k_far.size())};
  }

  const Run& run() const { return run_; }
  int64_t length() const { return length_; }

  // Reads the next `chunk` tokens.
  void read_chunk(int64_t chunk, Backward backward = Backward::kNone);
  // Reads the next `count` tokens one by one. Needs a limited pool.
  void decode(int64_t count);

 private:
  static constexpr Score kUnused = -std::numeric_limits<Score>::infinity();
  static constexpr Score kNan = std::numeric_limits<Score>::quiet_NaN();

  int64_t score_at(int64_t unit, int64_t position) const {
    const int64_t b = unit / spec_.num_kv_heads, h = unit % spec_.num_kv_heads;
    return (b * spec_.seqlen + position) * spec_.num_kv_heads + h;
  }
  bool is_candidate(int64_t position) const { return position >= spec_.num_sinks; }

  void record_selected() {
    typename Run::Selected selected{length_ - 1, {}};
    for (int64_t unit = 0; unit < units_; ++unit) {
      Indices positions;
      for (int64_t s = 0; s < spec_.topk; ++s) {
        if (slot_positions_[unit * spec_.topk + s] >= 0) positions.push_back(slot_positions_[unit * spec_.topk + s]);
      }
      std::sort(positions.begin(), positions.end());
      selected.positions.push_back(positions);
    }
    run_.selected.push_back(selected);
  }

  // The candidate scores of `count` queries; entries that no kernel may read are NaN.
  Poisoned<Score> candidate_scores(int64_t count) const {
    Poisoned<Score> scores(spec_.batch * count * spec_.num_kv_heads);
    for (int64_t unit = 0; unit < units_; ++unit) {
      for (int64_t t = 0; t < count; ++t) {
        const int64_t position = length_ + t - spec_.window_size;
        const int64_t at = (unit / spec_.num_kv_heads * count + t) * spec_.num_kv_heads + unit % spec_.num_kv_heads;
        if (is_candidate(position)) scores[at] = in_.scores[score_at(unit, position)];
      }
    }
    return scores;
  }

  struct ChunkSelection;
  void attend_chunk(int64_t chunk, const ChunkSelection& selection, Backward backward);

  const Problem& problem_;
  const Spec& spec_;
  const Storage<Element> in_;
  const bool far_rotary_;
  const int64_t units_, state_rows_;  // units: (batch row, KV head)
  int64_t length_ = 0;
  int64_t pool_capacity_;
  Indices row_position_;    // [units, state_rows] position in every state row, -1 empty
  Indices slot_positions_;  // [units, topk]
  std::vector<Score> slot_scores_, pool_scores_;
  Indices pool_position_;  // [units, pool_capacity]
  Run run_;
};

template <class Element>
struct StreamingRun<Element>::ChunkSelection {
  Poisoned<Score> tau;             // [batch, num_kv_heads, chunk]
  Poisoned<int32_t> window_begin;  // and the other outputs of chunk_visibility
  Poisoned<int32_t> far_begin, far_end, frac_begin, frac_end;
  Poisoned<uint8_t> is_sink;
  Indices row_position;  // [batch, num_rows, num_kv_heads]
  Indices pool_position;
  int64_t num_rows, pool_capacity;
};

template <class Element>
void StreamingRun<Element>::read_chunk(int64_t chunk, Backward backward) {
  const int64_t topk = spec_.topk, num_rows = state_rows_ + chunk;
  const int64_t new_capacity = spec_.pool_size > 0 ? spec_.pool_size : pool_capacity_ + chunk;
  const std::vector<int64_t> lengths(spec_.batch, length_);
  const Poisoned<Score> candidates = candidate_scores(chunk);
  const Poisoned<Score> slot_scores(slot_scores_), pool_scores(pool_scores_);
  Poisoned<int32_t> slot_expiry(units_ * topk), slot_frac_begin(units_ * topk), slot_frac_end(units_ * topk);
  Poisoned<int32_t> pool_frac_begin(units_ * pool_capacity_), pool_frac_end(units_ * pool_capacity_);
  Poisoned<int32_t> arrival_expiry(units_ * chunk), arrival_frac_begin(units_ * chunk),
      arrival_frac_end(units_ * chunk);
  Poisoned<int32_t> new_slot_source(units_ * topk), new_pool_source(units_ * new_capacity);
  Poisoned<int64_t> new_slot_positions(units_ * topk);
  ChunkSelection selection{Poisoned<Score>(units_ * chunk),
                           Poisoned<int32_t>(spec_.batch * chunk),
                           Poisoned<int32_t>(units_ * num_rows),
                           Poisoned<int32_t>(units_ * num_rows),
                           Poisoned<int32_t>(units_ * (pool_capacity_ + num_rows)),
                           Poisoned<int32_t>(units_ * (pool_capacity_ + num_rows)),
                           Poisoned<uint8_t>(spec_.batch * num_rows),
                           Indices(units_ * num_rows, -1),
                           pool_position_,
                           num_rows,
                           pool_capacity_};

  SelectChunkParams select{};
  select.dtype = std::is_same_v<Element, double> ? DType::kF64 : DType::kF32;
  select.candidate_scores = candidates.data();
  select.slot_scores = slot_scores.data();
  select.slot_positions = slot_positions_.data();
  select.pool_scores = pool_scores.data();
  select.lengths = lengths.data();
  select.tau = selection.tau.data();
  select.slot_expiry = slot_expiry.data();
  select.slot_frac_begin = slot_frac_begin.data();
  select.slot_frac_end = slot_frac_end.data();
  select.pool_frac_begin = pool_frac_begin.data();
  select.pool_frac_end = pool_frac_end.data();
  select.arrival_expiry = arrival_expiry.data();
  select.arrival_frac_begin = arrival_frac_begin.data();
  select.arrival_frac_end = arrival_frac_end.data();
  select.new_slot_source = new_slot_source.data();
  select.new_slot_positions = new_slot_positions.data();
  select.new_pool_source = new_pool_source.data();
  select.scores_strides = {chunk * spec_.num_kv_heads, spec_.num_kv_heads, 1};
  select.tau_strides = {spec_.num_kv_heads * chunk, 1, chunk};  // head-major, as attention reads it
  select.batch = static_cast<int32_t>(spec_.batch);
  select.chunk = static_cast<int32_t>(chunk);
  select.num_kv_heads = static_cast<int32_t>(spec_.num_kv_heads);
  select.topk = static_cast<int32_t>(topk);
  select.window_size = static_cast<int32_t>(spec_.window_size);
  select.num_sinks = static_cast<int32_t>(spec_.num_sinks);
  select.pool_size = static_cast<int32_t>(spec_.pool_size);
  select.pool_capacity = static_cast<int32_t>(pool_capacity_);
  select.new_pool_capacity = static_cast<int32_t>(new_capacity);
  cpu::select_chunk(select);

  Poisoned<int64_t> carried_source(units_ * state_rows_), state_source(units_ * state_rows_);
  ChunkVisibilityParams rows{};
  rows.lengths = lengths.data();
  rows.slot_expiry = slot_expiry.data();
  rows.slot_frac_begin = slot_frac_begin.data();
  rows.slot_frac_end = slot_frac_end.data();
  rows.pool_frac_begin = pool_frac_begin.data();
  rows.pool_frac_end = pool_frac_end.data();
  rows.arrival_expiry = arrival_expiry.data();
  rows.arrival_frac_begin = arrival_frac_begin.data();
  rows.arrival_frac_end = arrival_frac_end.data();
  rows.new_slot_source = new_slot_source.data();
  rows.window_begin = selection.window_begin.data();
  rows.far_begin = selection.far_begin.data();
  rows.far_end = selection.far_end.data();
  rows.frac_begin = selection.frac_begin.data();
  rows.frac_end = selection.frac_end.data();
  rows.is_sink = reinterpret_cast<bool*>(selection.is_sink.data());
  rows.carried_source = carried_source.data();
  rows.state_source = state_source.data();
  rows.batch = select.batch;
  rows.chunk = select.chunk;
  rows.num_kv_heads = select.num_kv_heads;
  rows.topk = select.topk;
  rows.window_size = select.window_size;
  rows.num_sinks = select.num_sinks;
  rows.pool_capacity = select.pool_capacity;
  cpu::chunk_visibility(rows);

  for (const Poisoned<int32_t>* buffer :
       {&slot_expiry, &slot_frac_begin, &slot_frac_end, &pool_frac_begin, &pool_frac_end, &arrival_expiry,
        &arrival_frac_begin, &arrival_frac_end, &new_slot_source, &new_pool_source, &selection.window_begin,
        &selection.far_begin, &selection.far_end, &selection.frac_begin, &selection.frac_end}) {
    EXPECT_GUARDS_INTACT(*buffer);
    EXPECT_FULLY_WRITTEN(*buffer);
  }
  for (const Poisoned<int64_t>* buffer : {&new_slot_positions, &carried_source, &state_source}) {
    EXPECT_GUARDS_INTACT(*buffer);
    EXPECT_FULLY_WRITTEN(*buffer);
  }
  EXPECT_GUARDS_INTACT(selection.tau);
  EXPECT_FULLY_WRITTEN(selection.tau);

  // Carried rows, then the chunk's own.
  for (int64_t unit = 0; unit < units_; ++unit) {
    const int64_t b = unit / spec_.num_kv_heads, h = unit % spec_.num_kv_heads;
    for (int64_t r = 0; r < num_rows; ++r) {
      int64_t& position = selection.row_position[(b * num_rows + r) * spec_.num_kv_heads + h];
      position = length_ + r - state_rows_;
      if (r < state_rows_) position = row_position_[carried_source[(b * state_rows_ + r) * spec_.num_kv_heads + h]];
    }
    for (int64_t t = 0; t < chunk; ++t) {
      run_.tau[score_at(unit, length_ + t)] = static_cast<double>(selection.tau[unit * chunk + t]);
    }
  }
  attend_chunk(chunk, selection, backward);

  // The new state.
  Indices new_row_position(units_ * state_rows_), new_pool_position(units_ * new_capacity, -1);
  std::vector<Score> new_pool_scores(units_ * new_capacity, kUnused);
  for (int64_t unit = 0; unit < units_; ++unit) {
    for (int64_t r = 0; r < state_rows_; ++r) {
      new_row_position[unit * state_rows_ + r] = selection.row_position[state_source[unit * state_rows_ + r]];
    }
    for (int64_t s = 0; s < topk; ++s) {
      const int64_t position = new_slot_positions[unit * topk + s];
      slot_positions_[unit * topk + s] = position;
      slot_scores_[unit * topk + s] = position >= 0 ? in_.scores[score_at(unit, position)] : kUnused;
      int64_t& row = new_row_position[unit * state_rows_ + spec_.num_sinks + spec_.window_size + s];
      if (position < 0) row = -1;  // empty slots name any row
      EXPECT_EQ(row, position) << "slot " << s << " holds another key than its position says";
    }
    for (int64_t rank = 0; rank < new_capacity; ++rank) {
      const int64_t source = new_pool_source[unit * new_capacity + rank];
      if (source < 0) continue;
      const int64_t position = source < pool_capacity_ ? pool_position_[unit * pool_capacity_ + source]
                                                       : length_ + source - pool_capacity_ - spec_.window_size;
      EXPECT_TRUE(is_candidate(position)) << "pool rank " << rank << " names position " << position;
      new_pool_position[unit * new_capacity + rank] = position;
      new_pool_scores[unit * new_capacity + rank] = in_.scores[score_at(unit, position)];
    }
  }
  row_position_ = new_row_position;
  pool_position_ = new_pool_position;
  pool_scores_ = new_pool_scores;
  pool_capacity_ = new_capacity;
  length_ += chunk;
  record_selected();
}

template <class Element>
void StreamingRun<Element>::attend_chunk(int64_t chunk, const ChunkSelection& selection, Backward backward) {
  const int64_t num_rows = selection.num_rows, dim = spec_.head_dim, heads = spec_.num_heads;
  const int64_t kv_heads = spec_.num_kv_heads;
  const int64_t first_ring_row = spec_.topk + spec_.num_sinks;
  const Element poison = poison_value<Element>(), zero = to_storage<Element>({0.0})[0];
  // Rows [batch, num_rows, num_kv_heads, head_dim]. Empty rows hold NaN keys with far rotary, which separates the two
  // uses of a row; without it, zeros.
  Poisoned<Element> k(units_ * num_rows * dim), v(units_ * num_rows * dim), k_far(units_ * num_rows * dim);
  Poisoned<Score> scores(units_ * num_rows);
  for (int64_t unit = 0; unit < units_; ++unit) {
    const int64_t b = unit / kv_heads, h = unit % kv_heads;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t position = selection.row_position[(b * num_rows + r) * kv_heads + h];
      const bool is_far = selection.far_begin[unit * num_rows + r] < selection.far_end[unit * num_rows + r];
      const bool in_window = r >= first_ring_row;
      const int64_t to = ((b * num_rows + r) * kv_heads + h) * dim;
      const int64_t from = ((b * spec_.seqlen + position) * kv_heads + h) * dim;
      for (int64_t d = 0; d < dim; ++d) {
        v[to + d] = position < 0 ? zero : in_.v[from + d];
        if (!far_rotary_) {
          k[to + d] = position < 0 ? zero : in_.k[from + d];
        } else {
          k[to + d] = position >= 0 && in_window ? in_.k[from + d] : poison;
          k_far[to + d] = position >= 0 && is_far ? in_.k_far[from + d] : poison;
        }
      }
      const bool has_score = position >= 0 && is_candidate(position);
      scores[unit * num_rows + r] = has_score ? in_.scores[score_at(unit, position)] : 0;
      if (selection.is_sink[b * num_rows + r]) scores[unit * num_rows + r] = -kUnused;
    }
  }
  Poisoned<Element> out(spec_.batch * chunk * problem_.q_row());
  Poisoned<Score> lse(spec_.batch * heads * chunk);
  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd = common_params<Element>(spec_);
  const int64_t first_q = length_ * problem_.q_row();
  fwd.q = in_.q.data() + first_q;
  fwd.k = k.data();
  fwd.v = v.data();
  fwd.q_far = far_rotary_ ? in_.q_far.data() + first_q : nullptr;
  fwd.k_far = far_rotary_ ? k_far.data() : nullptr;
  fwd.scores = scores.data();
  fwd.tau = selection.tau.data();
  fwd.window_begin = selection.window_begin.data();
  fwd.far_begin = selection.far_begin.data();
  fwd.far_end = selection.far_end.data();
  fwd.out = out.data();
  fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.q_far_strides = contiguous(spec_.seqlen, heads, dim);
  fwd.k_strides = fwd.v_strides = fwd.k_far_strides = contiguous(num_rows, kv_heads, dim);
  fwd.out_strides = contiguous(chunk, heads, dim);
  fwd.seqlen_q = static_cast<int32_t>(chunk);
  fwd.seqlen_k = static_cast<int32_t>(num_rows);
  fwd.num_carried = static_cast<int32_t>(state_rows_);
  cpu::attention_forward(fwd);
  EXPECT_GUARDS_INTACT(out);
  EXPECT_GUARDS_INTACT(lse);
  const auto add_queries = [&](Values& target, const Poisoned<Element>& chunk_values) {
    const int64_t row = problem_.q_row();
    for (int64_t b = 0; b < spec_.batch; ++b) {
      for (int64_t n = 0; n < chunk * row; ++n) {
        target[(b * spec_.seqlen + length_) * row + n] += as_double(chunk_values[b * chunk * row + n]);
      }
    }
  };
  add_queries(run_.out, out);
  for (int64_t row = 0; row < spec_.batch * heads; ++row) {
    for (int64_t t = 0; t < chunk; ++t) {
      run_.softmax_lse[row * spec_.seqlen + length_ + t] = static_cast<double>(lse[row * chunk + t]);
    }
  }
  if (backward == Backward::kNone) return;

  const int64_t num_score_rows = selection.pool_capacity + num_rows;
  GradientBuffers<Element> grad(out.size(), k.size(), far_rotary_, units_ * num_score_rows);
  grad.put(params, far_rotary_);
  std::vector<Score> dlse(lse.size());
  for (int64_t row = 0; row < spec_.batch * heads; ++row) {
    for (int64_t t = 0; t < chunk; ++t) dlse[row * chunk + t] = in_.dlse[row * spec_.seqlen + length_ + t];
  }
  params.dout = in_.dout.data() + first_q;
  params.dlse = dlse.data();
  params.frac_begin = selection.frac_begin.data();
  params.frac_end = selection.frac_end.data();
  params.dout_strides = fwd.q_strides;
  params.num_pool_rows = static_cast<int32_t>(selection.pool_capacity);
  params.deterministic = backward == Backward::kDeterministic;
  cpu::attention_backward(params);
  grad.check();
  add_queries(run_.grad.dq, grad.dq);
  if (far_rotary_) add_queries(run_.grad.dq_far, grad.dq_far);
  for (int64_t unit = 0; unit < units_; ++unit) {
    const int64_t b = unit / kv_heads, h = unit % kv_heads;
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t position = selection.row_position[(b * num_rows + r) * kv_heads + h];
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t from = ((b * num_rows + r) * kv_heads + h) * dim + d;
        const int64_t to = ((b * spec_.seqlen + position) * kv_heads + h) * dim + d;
        for (const auto& [target, source] : {std::pair{&run_.grad.dk, &grad.dk}, std::pair{&run_.grad.dv, &grad.dv},
                                             std::pair{&run_.grad.dk_far, &grad.dk_far}}) {
          if (source->size() == 0) continue;
          if (position >= 0) {
            (*target)[to] += as_double((*source)[from]);
          } else {
            EXPECT_EQ(as_double((*source)[from]), 0) << "gradient of an empty row";
          }
        }
      }
    }
    for (int64_t r = 0; r < num_score_rows; ++r) {
      const int64_t position =
          r < selection.pool_capacity
              ? selection.pool_position[unit * selection.pool_capacity + r]
              : selection.row_position[(b * num_rows + r - selection.pool_capacity) * kv_heads + h];
      const double du = static_cast<double>(grad.dscores[unit * num_score_rows + r]);
      if (position >= 0) {
        run_.grad.dscores[score_at(unit, position)] += du;
      } else {
        EXPECT_EQ(du, 0) << "score gradient of an empty row";
      }
    }
  }
}

template <class Element>
void StreamingRun<Element>::decode(int64_t count) {
  const int64_t dim = spec_.head_dim, topk = spec_.topk, kv_heads = spec_.num_kv_heads, w = spec_.window_size;
  const int64_t ring = spec_.num_sinks;  // first ring row
  const Storage<Element>& in = in_;
  // Rows that hold nothing are NaN.
  Poisoned<Element> state_k(units_ * state_rows_ * dim), state_v(units_ * state_rows_ * dim), ring_k(units_ * w * dim);
  for (int64_t unit = 0; unit < units_; ++unit) {
    const int64_t b = unit / kv_heads, h = unit % kv_heads;
    for (int64_t r = 0; r < state_rows_; ++r) {
      const int64_t position = row_position_[unit * state_rows_ + r];
      if (position < 0) continue;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t from = ((b * spec_.seqlen + position) * kv_heads + h) * dim + d;
        const int64_t to = (unit * state_rows_ + r) * dim + d;
        state_k[to] = far_rotary_ ? in.k_far[from] : in.k[from];
        state_v[to] = in.v[from];
        if (r >= ring && r < ring + w) ring_k[(unit * w + r - ring) * dim + d] = in.k[from];
      }
    }
  }
  Poisoned<Score> slot_scores(slot_scores_), pool_scores(pool_scores_);
  Poisoned<int64_t> slot_positions(slot_positions_), lengths(std::vector<int64_t>(spec_.batch, length_));
  const bool from_the_start = length_ == 0;  // then eq. 1b's sums are complete
  Poisoned<Score> ring_mass(units_ * w);
  for (int64_t n = 0; n < count; ++n) {
    const Poisoned<Score> candidates = candidate_scores(1);
    for (int64_t unit = 0; unit < units_ && from_the_start && length_ >= w; ++unit) {
      run_.mass[score_at(unit, length_ - w)] = static_cast<double>(ring_mass[unit * w + length_ % w]);
    }
    Poisoned<Element> out(spec_.batch * problem_.q_row());
    Poisoned<Score> lse(spec_.batch * spec_.num_heads);
    DecodeStepParams params{};
    params.dtype = dtype_of<Element>();
    const int64_t q_at = length_ * problem_.q_row(), kv_at = length_ * problem_.kv_row();
    params.q = in.q.data() + q_at;
    params.q_far = far_rotary_ ? in.q_far.data() + q_at : nullptr;
    params.k = in.k.data() + kv_at;
    params.k_far = far_rotary_ ? in.k_far.data() + kv_at : nullptr;
    params.v = in.v.data() + kv_at;
    params.candidate_scores = candidates.data();
    params.state_k = state_k.data();
    params.state_v = state_v.data();
    params.ring_k = far_rotary_ ? ring_k.data() : nullptr;
    params.slot_scores = slot_scores.data();
    params.slot_positions = slot_positions.data();
    params.pool_scores = pool_scores.data();
    params.ring_mass = from_the_start ? ring_mass.data() : nullptr;
    params.lengths = lengths.data();
    params.out = out.data();
    params.softmax_lse = lse.data();
    params.q_stride_batch = params.q_far_stride_batch = spec_.seqlen * problem_.q_row();
    params.k_stride_batch = params.k_far_stride_batch = params.v_stride_batch = spec_.seqlen * problem_.kv_row();
    params.q_stride_head = params.q_far_stride_head = params.k_stride_head = params.k_far_stride_head =
        params.v_stride_head = dim;
    params.batch = static_cast<int32_t>(spec_.batch);
    params.num_heads = static_cast<int32_t>(spec_.num_heads);
    params.num_kv_heads = static_cast<int32_t>(kv_heads);
    params.head_dim = static_cast<int32_t>(dim);
    params.topk = static_cast<int32_t>(topk);
    params.window_size = static_cast<int32_t>(w);
    params.num_sinks = static_cast<int32_t>(spec_.num_sinks);
    params.pool_size = static_cast<int32_t>(spec_.pool_size);
    params.gate = spec_.gate;
    params.softmax_scale = spec_.softmax_scale;
    cpu::decode_step(params);

    EXPECT_GUARDS_INTACT(out);
    EXPECT_GUARDS_INTACT(lse);
    for (const Poisoned<Element>* buffer : {&state_k, &state_v, &ring_k}) EXPECT_GUARDS_INTACT(*buffer);
    for (const Poisoned<Score>* buffer : {&slot_scores, &pool_scores, &ring_mass}) EXPECT_GUARDS_INTACT(*buffer);
    for (const Poisoned<int64_t>* buffer : {&slot_positions, &lengths}) EXPECT_GUARDS_INTACT(*buffer);
    for (int64_t b = 0; b < spec_.batch; ++b) {
      EXPECT_EQ(lengths[b], length_ + 1);
      for (int64_t d = 0; d < problem_.q_row(); ++d) {
        run_.out[(b * spec_.seqlen + length_) * problem_.q_row() + d] = as_double(out[b * problem_.q_row() + d]);
      }
      for (int64_t head = 0; head < spec_.num_heads; ++head) {
        run_.softmax_lse[(b * spec_.num_heads + head) * spec_.seqlen + length_] =
            static_cast<double>(lse[b * spec_.num_heads + head]);
      }
    }
    ++length_;
    slot_positions_ = slot_positions.to_vector();
    record_selected();
  }
  slot_scores_ = slot_scores.to_vector();
  pool_scores_ = pool_scores.to_vector();
  for (int64_t unit = 0; unit < units_; ++unit) {  // for chunks that follow
    for (int64_t j = 0; j < std::min(spec_.num_sinks, length_); ++j) row_position_[unit * state_rows_ + j] = j;
    for (int64_t p = std::max<int64_t>(0, length_ - w); p < length_; ++p) {
      row_position_[unit * state_rows_ + ring + p % w] = p;
    }
    for (int64_t s = 0; s < topk; ++s) {
      row_position_[unit * state_rows_ + ring + w + s] = slot_positions_[unit * topk + s];
    }
    for (int64_t rank = 0; rank < pool_capacity_; ++rank) pool_position_[unit * pool_capacity_ + rank] = -1;
    // The decode state keeps no pool positions; a chunk's backward after tokens is not run.
    for (int64_t rank = 0; rank < pool_capacity_; ++rank) {
      const Score score = pool_scores_[unit * pool_capacity_ + rank];
      if (score == kUnused) break;
      int64_t& position = pool_position_[unit * pool_capacity_ + rank];
      for (int64_t p = rank > 0 && pool_scores_[unit * pool_capacity_ + rank - 1] == score
                           ? pool_position_[unit * pool_capacity_ + rank - 1] + 1
                           : spec_.num_sinks;
           position < 0 && p < length_ - w; ++p) {
        if (in_.scores[score_at(unit, p)] == score) position = p;
      }
      EXPECT_GE(position, 0) << "pool score " << score << " belongs to no key";
    }
  }
}

}  // namespace sparsek::test
