// decode_step: checks scores and state, changes the state, and shares the attention between OpenMP threads: whole
// (batch row, KV head) units when there are enough of them to keep every thread busy, otherwise their tiles. At most
// one parallel region per call.
#include "kernels/cpu/decode/decode_step.h"

#include <omp.h>

#include <cassert>
#include <cmath>
#include <limits>

#include "base/bf16.h"
#include "base/error.h"
#include "kernels/cpu/carried_state.h"
#include "kernels/cpu/decode/decode_f64.h"
#include "kernels/cpu/decode/tiles.h"
#include "kernels/cpu/decode/unit_state.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {
namespace {

constexpr int64_t kMinParallelWork = 32 * 1024;  // elements of K that the call reads

constexpr PerIsa<void (*)(const Tile&)> kAttendBf16{&portable::attend_tile_bf16, &avx2::attend_tile_bf16,
                                                    &avx512::attend_tile_bf16};
constexpr PerIsa<void (*)(const Tile&)> kAttendF32{&portable::attend_tile_f32, &avx2::attend_tile_f32,
                                                   &avx512::attend_tile_f32};
constexpr PerIsa<void (*)(const TileMerge&)> kMerge{&portable::merge_tiles, &avx2::merge_tiles, &avx512::merge_tiles};

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// The attention of one (batch row, KV head), tile by tile. Kept between calls, so that steps allocate nothing.
template <class Element>
class alignas(64) UnitAttention {
 public:
  // Changes the state and lays out the tiles.
  void prepare(const DecodeStepParams& p, int batch_row, int kv_head) {
    UnitState<Element, float> state(p, batch_row, kv_head);
    state.take_token();
    state.visible_runs(runs_);
    group_ = p.num_heads / p.num_kv_heads;
    first_head_ = kv_head * group_;
    gates_.resize(p.topk + kStatsPadding);
    const bool gated = state.slot_weights(gates_.data());

    int64_t num_tiles = 0;
    for (const Run& run : runs_) num_tiles += tiles_of(run);
    stats_stride_ = round_up(num_tiles, kStatsPadding);
    head_dim_stride_ = round_up(p.head_dim, kStatsPadding);
    maximum_.assign(group_ * stats_stride_, -std::numeric_limits<float>::infinity());
    sum_.assign(group_ * stats_stride_, 0.0f);
    factors_.resize(stats_stride_);
    window_factors_.resize(stats_stride_);
    values_.resize(group_ * num_tiles * head_dim_stride_);
    const int32_t num_near_rows = p.num_sinks + p.window_size;
    const bool wants_mass = state.ring_mass != nullptr;
    if (wants_mass) probabilities_.resize(group_ * num_near_rows);

    const Element* q = static_cast<const Element*>(p.q) + batch_row * p.q_stride_batch + first_head_ * p.q_stride_head;
    const Element* q_far = q;
    int64_t q_far_stride = p.q_stride_head;
    if (p.q_far != nullptr) {
      q_far_stride = p.q_far_stride_head;
      q_far = static_cast<const Element*>(p.q_far) + batch_row * p.q_far_stride_batch + first_head_ * q_far_stride;
    }
    tiles_.clear();
    num_window_tiles_ = 0;
    for (const Run& run : runs_) {
      const int32_t step = static_cast<int32_t>(round_up((run.num_rows + tiles_of(run) - 1) / tiles_of(run), 16));
      for (int32_t row = run.first_row; row < run.first_row + run.num_rows; row += step) {
        const int64_t t = static_cast<int64_t>(tiles_.size());
        // A near row with far rotary: row - num_sinks >= 0, since sinks outside the window are then far.
        const Element* k = state.ring_k != nullptr && !run.is_far
                               ? state.ring_k + int64_t{row - p.num_sinks} * p.head_dim
                               : state.k + int64_t{row} * p.head_dim;
        tiles_.push_back({.q = run.is_far ? q_far : q,
                          .k = k,
                          .v = state.v + int64_t{row} * p.head_dim,
                          .gates = run.is_slot && gated ? gates_.data() + (row - num_near_rows) : nullptr,
                          .probabilities = wants_mass && !run.is_slot ? probabilities_.data() + row : nullptr,
                          .maximum = maximum_.data() + t,
                          .sum = sum_.data() + t,
                          .values = values_.data() + t * head_dim_stride_,
                          .q_head_stride = run.is_far ? q_far_stride : p.q_stride_head,
                          .probabilities_stride = num_near_rows,
                          .stats_stride = stats_stride_,
                          .values_stride = num_tiles * head_dim_stride_,
                          .rows = std::min(step, run.first_row + run.num_rows - row),
                          .group = group_,
                          .head_dim = p.head_dim,
                          .softmax_scale = static_cast<float>(p.softmax_scale)});
        first_rows_.resize(tiles_.size());
        first_rows_.back() = row;
        if (!run.is_slot) num_window_tiles_ = static_cast<int32_t>(tiles_.size());
      }
    }
    assert(static_cast<int64_t>(tiles_.size()) <= num_tiles);
  }

  const std::vector<Tile>& tiles() const { return tiles_; }

  // out, softmax_lse and ring_mass from the attended tiles.
  void finish(const DecodeStepParams& p, int batch_row, int kv_head) {
    const UnitState<Element, float> state(p, batch_row, kv_head);
    for (int64_t head = 0; head < group_; ++head) {
      const int64_t row = int64_t{batch_row} * p.num_heads + first_head_ + head;
      kMerge.active()({.out_dtype = p.dtype,
                       .maximum = maximum_.data() + head * stats_stride_,
                       .sum = sum_.data() + head * stats_stride_,
                       .values = tiles_[0].values + head * tiles_[0].values_stride,
                       .factors = factors_.data(),
                       .window_factors = state.ring_mass != nullptr ? window_factors_.data() : nullptr,
                       .out = static_cast<Element*>(p.out) + row * p.head_dim,
                       .softmax_lse = p.softmax_lse != nullptr ? static_cast<float*>(p.softmax_lse) + row : nullptr,
                       .values_stride = head_dim_stride_,
                       .num_tiles = static_cast<int32_t>(tiles_.size()),
                       .num_window_tiles = num_window_tiles_,
                       .head_dim = p.head_dim});
      if (state.ring_mass != nullptr) add_mass(state, head);
    }
  }

 private:
  static int64_t tiles_of(const Run& run) { return (run.num_rows + kTileRows - 1) / kTileRows; }

  // eq. 1b: exp(logit - lse^W) = exp(logit - maximum of its tile) * window_factor of its tile.
  void add_mass(const UnitState<Element, float>& state, int64_t head) {
    state.older_half([&](int64_t begin, int64_t end) {
      for (int32_t t = 0; t < num_window_tiles_; ++t) {
        const int64_t tile_begin = first_rows_[t] - state.params.num_sinks;  // ring row; negative: a sink
        const int64_t from = std::max(begin, tile_begin), to = std::min(end, tile_begin + tiles_[t].rows);
        const float* probabilities = tiles_[t].probabilities + head * tiles_[t].probabilities_stride;
        for (int64_t row = from; row < to; ++row) {
          state.ring_mass[row] += probabilities[row - tile_begin] * window_factors_[t];
        }
      }
    });
  }

  std::vector<Run> runs_;
  std::vector<Tile> tiles_;
  std::vector<int32_t> first_rows_;  // state row of each tile
  std::vector<float> gates_, probabilities_, maximum_, sum_, factors_, window_factors_, values_;
  int64_t stats_stride_ = 0, head_dim_stride_ = 0;
  int32_t group_ = 0, first_head_ = 0, num_window_tiles_ = 0;
};

template <class Element>
void step(const DecodeStepParams& p, const PerIsa<void (*)(const Tile&)>& attend) {
  const int32_t num_units = p.batch * p.num_kv_heads;
  const int64_t state_rows = int64_t{p.num_sinks} + p.window_size + p.topk;
  const bool is_parallel = num_units * state_rows * p.head_dim >= kMinParallelWork;
  const int num_threads = is_parallel ? omp_get_max_threads() : 1;
  const auto attend_tile = attend.active();

  // The caller's; the other threads are lent theirs, since what OpenMP's threads own themselves is never freed.
  static thread_local std::vector<UnitAttention<Element>> workspaces;
  std::vector<UnitAttention<Element>>& attention = workspaces;  // not thread_local: the same in every thread
  const bool share_units = num_units % num_threads == 0 || num_units >= 8 * num_threads;
  const auto num_workspaces = static_cast<size_t>(share_units ? num_threads : num_units);
  if (attention.size() < num_workspaces) attention.resize(num_workspaces);
  if (share_units) {
    const auto whole_unit = [&](int32_t unit, UnitAttention<Element>& own) {
      own.prepare(p, unit / p.num_kv_heads, unit % p.num_kv_heads);
      for (const Tile& tile : own.tiles()) attend_tile(tile);
      own.finish(p, unit / p.num_kv_heads, unit % p.num_kv_heads);
    };
    if (num_threads == 1) {
      for (int32_t unit = 0; unit < num_units; ++unit) whole_unit(unit, attention[0]);
    } else {
      FirstError error;
#pragma omp parallel for schedule(dynamic, 1)
      for (int32_t unit = 0; unit < num_units; ++unit) {
        error.guard([&] { whole_unit(unit, attention[omp_get_thread_num()]); });
      }
      error.rethrow();
    }
    return;
  }

  static thread_local std::vector<const Tile*> own_tiles;
  std::vector<const Tile*>& tiles = own_tiles;
  tiles.clear();
  for (int32_t unit = 0; unit < num_units; ++unit) {
    attention[unit].prepare(p, unit / p.num_kv_heads, unit % p.num_kv_heads);
    for (const Tile& tile : attention[unit].tiles()) tiles.push_back(&tile);
  }
  const auto num_tiles = static_cast<int32_t>(tiles.size());
#pragma omp parallel for schedule(dynamic, 1)
  for (int32_t t = 0; t < num_tiles; ++t) attend_tile(*tiles[t]);
  for (int32_t unit = 0; unit < num_units; ++unit) {
    attention[unit].finish(p, unit / p.num_kv_heads, unit % p.num_kv_heads);
  }
}

// Before anything is changed.
template <class Score>
void check_values(const DecodeStepParams& p) {
  const CarriedSizes sizes{p.topk, p.window_size, p.num_sinks, p.pool_size};
  for (int32_t b = 0; b < p.batch; ++b) {
    for (int32_t h = 0; h < p.num_kv_heads; ++h) {
      const int64_t unit = int64_t{b} * p.num_kv_heads + h;
      check_carried_state(static_cast<const Score*>(p.slot_scores) + unit * p.topk, p.slot_positions + unit * p.topk,
                          static_cast<const Score*>(p.pool_scores) + unit * p.pool_size, p.pool_size, p.lengths[b],
                          sizes, b, h);
      const UnitState<Score, Score> state(p, b, h);  // for its scores alone
      const auto check = [&](Score u, int64_t at) {
        if (!std::isfinite(u))
          throw_data("scores must be finite, got {} at batch row {}, position {}, head {}", u, b, at, h);
      };
      if (state.new_score != nullptr) check(*state.new_score, 0);  // of the one token given
      if (state.has_candidate()) check(*state.candidate_score, state.leaving_position());
    }
  }
}

}  // namespace

void decode_step(const DecodeStepParams& p) {
  assert(p.pool_size > p.topk && p.topk >= 1 && p.window_size >= 1 && p.num_sinks >= 0);
  assert(p.num_heads % p.num_kv_heads == 0);
  assert((p.q_far != nullptr) == (p.k_far != nullptr) && (p.q_far != nullptr) == (p.ring_k != nullptr));
  switch (p.dtype) {
    case DType::kF64:
      check_values<double>(p);
      decode_step_f64(p);
      break;
    case DType::kF32:
      check_values<float>(p);
      step<float>(p, kAttendF32);
      break;
    default:
      assert(p.dtype == DType::kBF16);
      check_values<float>(p);
      step<BFloat16>(p, kAttendBf16);
  }
  for (int32_t b = 0; b < p.batch; ++b) p.lengths[b] += 1;
}

}  // namespace sparsek::cpu
