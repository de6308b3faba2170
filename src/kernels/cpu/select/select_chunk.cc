// Selection of a chunk of queries behind a carried state (eq. 3-6, 12). The pool's scores carry the ranks; slots, which
// stand in any order, are matched to the first topk ranks by score and position.
#include <algorithm>
#include <cassert>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/cpu/carried_state.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/select/finite.h"
#include "kernels/cpu/select/lane.h"
#include "kernels/cpu/select/select.h"

namespace sparsek::cpu {
namespace {

// One (batch row, KV head).
template <class T>
struct ChunkLane {
  int64_t first_query = 0;           // query of arrival 0
  int64_t num_used = 0;              // pool entries in use
  std::vector<int32_t> slot_order;   // used slots by rank
  std::unique_ptr<T[]> tau;          // [num_arrivals]
  std::unique_ptr<int32_t[]> times;  // expiry, frac_begin, frac_end: [3][num_keys]
};

template <class T>
std::vector<int32_t> order_slots(const T* scores, const int64_t* positions, int64_t topk) {
  std::vector<int32_t> order;
  order.reserve(topk);
  for (int32_t s = 0; s < topk; ++s) {
    if (positions[s] >= 0) order.push_back(s);
  }
  const auto ranks_before = [&](int32_t a, int32_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && positions[a] < positions[b]);
  };
  if (!std::is_sorted(order.begin(), order.end(), ranks_before)) std::sort(order.begin(), order.end(), ranks_before);
  return order;
}

struct Interval {
  int32_t begin, end;
};

template <class T>
class ChunkOutputs {
 public:
  ChunkOutputs(const SelectChunkParams& params, const Lane<T>& lane, const ChunkLane<T>& chunk_lane, int64_t b,
               int64_t h)
      : params_(params), lane_(lane), chunk_lane_(chunk_lane), b_(b), h_(h), row_(b * params.num_kv_heads + h) {}

  void write() const {
    write_tau();
    write_slots();
    write_pool();
    write_arrivals();
    write_state();
  }

 private:
  int32_t query(int32_t time) const { return static_cast<int32_t>(chunk_lane_.first_query + time); }
  int32_t expiry(int64_t key) const { return query(lane_.expiry[key]); }
  // Where the key is never fractional both ends are `otherwise`.
  Interval fraction(int64_t key, int32_t otherwise) const {
    if (lane_.frac_begin[key] >= lane_.frac_end[key]) return {otherwise, otherwise};
    return {query(lane_.frac_begin[key]), query(lane_.frac_end[key])};
  }

  void write_tau() const {
    T* const tau = static_cast<T*>(params_.tau) + b_ * params_.tau_strides.batch + h_ * params_.tau_strides.head;
    for (int64_t i = 0; i < params_.chunk; ++i) {
      const int64_t time = i - chunk_lane_.first_query;
      tau[i * params_.tau_strides.seq] = time >= 0 ? lane_.tau[time] : -std::numeric_limits<T>::infinity();
    }
  }

  void write_slots() const {
    const int64_t base = row_ * params_.topk;
    for (int32_t* out : {params_.slot_expiry, params_.slot_frac_begin, params_.slot_frac_end}) {
      std::fill_n(out + base, params_.topk, 0);
    }
    for (size_t rank = 0; rank < chunk_lane_.slot_order.size(); ++rank) {
      const int64_t slot = base + chunk_lane_.slot_order[rank];
      const Interval interval = fraction(static_cast<int64_t>(rank), 0);
      params_.slot_expiry[slot] = expiry(static_cast<int64_t>(rank));
      params_.slot_frac_begin[slot] = interval.begin;
      params_.slot_frac_end[slot] = interval.end;
    }
  }

  void write_pool() const {
    const int64_t base = row_ * params_.pool_capacity;
    for (int64_t rank = 0; rank < params_.pool_capacity; ++rank) {
      const bool is_pool_row = rank >= params_.topk && rank < chunk_lane_.num_used;
      const Interval interval = is_pool_row ? fraction(rank, 0) : Interval{0, 0};
      params_.pool_frac_begin[base + rank] = interval.begin;
      params_.pool_frac_end[base + rank] = interval.end;
    }
  }

  void write_arrivals() const {
    const int64_t base = row_ * params_.chunk;
    for (int32_t i = 0; i < params_.chunk; ++i) {
      const int64_t arrival = i - chunk_lane_.first_query;
      const int64_t key = chunk_lane_.num_used + arrival;
      const Interval interval = arrival >= 0 ? fraction(key, i) : Interval{i, i};
      params_.arrival_expiry[base + i] = arrival >= 0 ? expiry(key) : i;
      params_.arrival_frac_begin[base + i] = interval.begin;
      params_.arrival_frac_end[base + i] = interval.end;
    }
  }

  void write_state() const {
    int32_t* const slot_source = params_.new_slot_source + row_ * params_.topk;
    int64_t* const slot_positions = params_.new_slot_positions + row_ * params_.topk;
    int32_t* const pool_source = params_.new_pool_source + row_ * params_.new_pool_capacity;
    const auto num_pool = static_cast<int64_t>(lane_.final_pool.size());
    assert(num_pool <= params_.new_pool_capacity);
    std::fill_n(slot_source, params_.topk, -1);
    std::fill_n(slot_positions, params_.topk, -1);
    std::fill(pool_source + num_pool, pool_source + params_.new_pool_capacity, -1);
    const int64_t num_used = chunk_lane_.num_used;
    for (int64_t rank = 0; rank < num_pool; ++rank) {
      const int64_t key = lane_.final_pool[rank].id;
      const int64_t i = chunk_lane_.first_query + key - num_used;  // of an arrival: its query
      pool_source[rank] = static_cast<int32_t>(key < num_used ? key : params_.pool_capacity + i);
      if (rank >= params_.topk) continue;
      if (key < num_used) {
        const int32_t slot = chunk_lane_.slot_order[key];
        slot_source[rank] = slot;
        slot_positions[rank] = params_.slot_positions[row_ * params_.topk + slot];
      } else {
        slot_source[rank] = static_cast<int32_t>(params_.topk + i);
        slot_positions[rank] = params_.lengths[b_] + i - params_.window_size;
      }
    }
  }

  const SelectChunkParams& params_;
  const Lane<T>& lane_;
  const ChunkLane<T>& chunk_lane_;
  const int64_t b_, h_, row_;
};

// Query of the chunk at which the first key becomes a candidate, at most `chunk`.
int64_t first_candidate_query(const SelectChunkParams& params, int64_t b) {
  const int64_t query = int64_t{params.num_sinks} + params.window_size - params.lengths[b];
  return std::clamp<int64_t>(query, 0, params.chunk);
}

template <class T>
void select_chunk_typed(const SelectChunkParams& params) {
  const T* const scores = static_cast<const T*>(params.candidate_scores);
  const Strides& strides = params.scores_strides;
  const int64_t num_lanes = int64_t{params.batch} * params.num_kv_heads;
  std::vector<Lane<T>> lanes(num_lanes);
  std::vector<ChunkLane<T>> chunk_lanes(num_lanes);

  parallel_for(num_lanes, [&](int64_t row) {
    const int64_t b = row / params.num_kv_heads, h = row % params.num_kv_heads;
    Lane<T>& lane = lanes[row];
    ChunkLane<T>& chunk_lane = chunk_lanes[row];
    const T* pool = static_cast<const T*>(params.pool_scores) + row * params.pool_capacity;
    const CarriedSizes sizes{params.topk, params.window_size, params.num_sinks, params.pool_size};
    const T* const slot_scores = static_cast<const T*>(params.slot_scores) + row * params.topk;
    chunk_lane.num_used = check_carried_state(slot_scores, params.slot_positions + row * params.topk, pool,
                                              params.pool_capacity, params.lengths[b], sizes, b, h);
    chunk_lane.slot_order = order_slots(slot_scores, params.slot_positions + row * params.topk, params.topk);
    for (size_t rank = 0; rank < chunk_lane.slot_order.size(); ++rank) {
      if (slot_scores[chunk_lane.slot_order[rank]] == pool[rank]) continue;
      throw_data("slot_scores must be the highest pool_scores, but are not in batch row {}, KV head {}", b, h);
    }
    chunk_lane.first_query = first_candidate_query(params, b);
    lane.carried = pool;
    lane.num_carried = chunk_lane.num_used;
    lane.scores = scores + b * strides.batch + chunk_lane.first_query * strides.seq + h * strides.head;
    lane.stride = strides.seq;
    lane.num_arrivals = params.chunk - chunk_lane.first_query;
    const int64_t num_keys = lane.num_carried + lane.num_arrivals;
    chunk_lane.tau = std::make_unique_for_overwrite<T[]>(lane.num_arrivals);
    chunk_lane.times = std::make_unique_for_overwrite<int32_t[]>(3 * num_keys);
    lane.tau = chunk_lane.tau.get();
    lane.expiry = chunk_lane.times.get();
    lane.frac_begin = lane.expiry + num_keys;
    lane.frac_end = lane.frac_begin + num_keys;
  });
  if (!select_lanes<T>(lanes, params.topk, params.pool_size)) {
    throw_not_finite("candidate scores", scores, strides, params.batch, params.chunk, params.num_kv_heads,
                     [&](int64_t b, int64_t i) { return i >= first_candidate_query(params, b); });
  }
  parallel_for(num_lanes, [&](int64_t row) {
    ChunkOutputs<T>(params, lanes[row], chunk_lanes[row], row / params.num_kv_heads, row % params.num_kv_heads).write();
  });
}

}  // namespace

void select_chunk(const SelectChunkParams& params) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  assert(params.topk >= 1 && params.window_size >= 1 && params.num_sinks >= 0 && params.chunk >= 1);
  params.dtype == DType::kF64 ? select_chunk_typed<double>(params) : select_chunk_typed<float>(params);
}

}  // namespace sparsek::cpu
