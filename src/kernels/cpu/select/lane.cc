// docs/math.md section 7, "all prefix thresholds in parallel", in three steps:
//   1. every stretch of arrivals is sorted by rank                      (parallel over stretches);
//   2. the pool at each stretch's start: merge and cut, one by one      (parallel over lanes), and tau there;
//   3. inside a stretch, time runs backwards from the full sorted list, un-arriving keys (parallel over stretches).
// Running backwards every boundary moves one way, so each key's expiry and fractional interval is written once, at the
// moment the boundary passes it. tau at a stretch's ends comes from step 2 alone and tau inside is kept between the two
// and non-decreasing after rounding: then the intervals of neighbouring stretches agree and p never increases.
#include "kernels/cpu/select/lane.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <limits>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/select/threshold.h"

namespace sparsek::cpu {
namespace {

// A stretch's start pool and the threshold there; the last one of a lane is the final state.
template <class T>
struct PoolState {
  std::vector<Ranked<T>> pool;  // by rank, closed by list_end
  Threshold threshold;
  T tau = -std::numeric_limits<T>::infinity();  // threshold.tau rounded, non-decreasing along the lane
  int64_t size() const { return static_cast<int64_t>(pool.size()) - 1; }
};

template <class T>
struct LaneWork {
  int64_t stretch = 1;               // arrivals per stretch
  std::vector<Ranked<T>> sorted;     // stretch c at c * (stretch + 1), each closed by list_end
  std::vector<PoolState<T>> states;  // [num_stretches + 1]
  int64_t num_stretches(const Lane<T>& lane) const { return (lane.num_arrivals + stretch - 1) / stretch; }
  Ranked<T>* sorted_stretch(int64_t c) { return sorted.data() + c * (stretch + 1); }
};

struct Job {
  int64_t lane, stretch;
};

// Arrivals per stretch: enough stretches for the threads, but long against the pool that each merges. Independent of
// the number of threads, so that results are.
int64_t stretch_length(int64_t num_arrivals, int64_t num_carried, int64_t pool_size) {
  const int64_t pool = pool_size > 0 ? pool_size : std::max<int64_t>(num_carried, 4096);
  return std::clamp<int64_t>(std::max(num_arrivals / 16, pool / 2), 512, 16384);
}

template <class T>
bool sort_stretch(const Lane<T>& lane, LaneWork<T>& work, int64_t c, RankSorter<T>& sorter) {
  const int64_t first = c * work.stretch, count = std::min(work.stretch, lane.num_arrivals - first);
  Ranked<T>* entries = work.sorted_stretch(c);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const T score = lane.scores[(first + i) * lane.stride] + T{0};  // -0.0 becomes +0.0
    finite &= std::isfinite(score);
    entries[i] = {score, static_cast<int32_t>(lane.num_carried + first + i)};
  }
  if (!finite) return false;
  sorter.sort(entries, count);
  entries[count] = list_end<T>();
  const int64_t key_begin = c == 0 ? 0 : lane.num_carried + first, key_end = lane.num_carried + first + count;
  for (int32_t* result : {lane.expiry, lane.frac_begin, lane.frac_end}) {
    std::fill(result + key_begin, result + key_end, static_cast<int32_t>(lane.num_arrivals));
  }
  return true;
}

template <class T>
void set_threshold(PoolState<T>& state, int64_t topk, T least) {
  const Ranked<T>* pool = state.pool.data();
  state.threshold = sparsek_threshold([pool](int64_t i) { return pool[i].score; }, state.size(), topk);
  state.tau = std::max(static_cast<T>(state.threshold.tau), least);
}

template <class T>
void scan_pools(const Lane<T>& lane, LaneWork<T>& work, int64_t topk, int64_t pool_size) {
  const int64_t num_stretches = work.num_stretches(lane);
  work.states.resize(num_stretches + 1);
  PoolState<T>& start = work.states[0];
  start.pool.resize(lane.num_carried + 1);
  for (int64_t r = 0; r < lane.num_carried; ++r) start.pool[r] = {lane.carried[r] + T{0}, static_cast<int32_t>(r)};
  start.pool.back() = list_end<T>();
  for (int64_t c = 0; c < num_stretches; ++c) {
    PoolState<T>&from = work.states[c], &to = work.states[c + 1];
    const int64_t total = from.size() + std::min(work.stretch, lane.num_arrivals - c * work.stretch);
    const int64_t wanted = pool_size > 0 ? std::min(total, pool_size) : total;
    to.pool.resize(wanted + 1);
    merge_ranked(from.pool.data(), work.sorted_stretch(c), wanted,
                 [&](int64_t i, const Ranked<T>& e) { to.pool[i] = e; });
    to.pool[wanted] = list_end<T>();
    set_threshold(to, topk, from.tau);
    if (pool_size == 0 && wanted > topk) {  // a key with p = 0 never matters again
      to.pool.resize(std::max(to.threshold.num_support, topk + 1) + 1);
      to.pool.back() = list_end<T>();
    }
  }
}

// Step 3 for one stretch. Nodes 1..num_nodes are its start pool and arrivals by rank, doubly linked; 0 and num_nodes +
// 1 are the ends. "Live" nodes have arrived by the current time.
template <class T>
class BackwardWalk {
 public:
  void run(const Lane<T>& lane, LaneWork<T>& work, int64_t c, int64_t topk, int64_t pool_size) {
    lane_ = &lane;
    topk_ = topk;
    pool_size_ = pool_size > 0 ? pool_size : std::numeric_limits<int64_t>::max();
    const int64_t first = c * work.stretch, count = std::min(work.stretch, lane.num_arrivals - first);
    const PoolState<T>&start = work.states[c], &end = work.states[c + 1];
    link(start, work.sorted_stretch(c), first, count);
    enter(end);
    for (int64_t i = count - 1; i >= 0; --i) {
      const auto time = static_cast<int32_t>(first + i);
      if (i < count - 1) {
        if (changed_) update_tau(start.tau);
        move_boundaries(time + 1);
      }
      lane.tau[time] = tau_;
      if (i == 0 && c == 0) open_carried(start.size());
      remove(arrival_node_[i], time);
    }
    if (c > 0) {  // what changed between the last time of the stretch before and the first of this one
      tau_ = start.tau;
      move_boundaries(static_cast<int32_t>(first));
    }
  }

 private:
  void link(const PoolState<T>& start, const Ranked<T>* sorted, int64_t first, int64_t count) {
    num_nodes_ = static_cast<int32_t>(start.size() + count);
    if (static_cast<int64_t>(score_.size()) < num_nodes_ + 2) {
      for (auto* links : {&next_, &previous_, &key_}) links->resize(num_nodes_ + 2);
      score_.resize(num_nodes_ + 2);
    }
    if (static_cast<int64_t>(arrival_node_.size()) < count) arrival_node_.resize(count);
    const auto first_key = static_cast<int32_t>(lane_->num_carried + first);
    merge_ranked(start.pool.data(), sorted, num_nodes_, [&](int64_t i, const Ranked<T>& entry) {
      score_[i + 1] = entry.score;
      key_[i + 1] = entry.id;
    });
    for (int32_t node = 1; node <= num_nodes_; ++node) {
      if (key_[node] >= first_key) arrival_node_[key_[node] - first_key] = node;
    }
    score_[0] = std::numeric_limits<T>::infinity();
    score_[num_nodes_ + 1] = -std::numeric_limits<T>::infinity();
    for (int32_t node = 0; node <= num_nodes_ + 1; ++node) {
      next_[node] = node + 1;
      previous_[node] = node - 1;
    }
  }

  // The state at the stretch's last time: every node is live.
  void enter(const PoolState<T>& end) {
    num_live_ = num_nodes_;
    kth_ = static_cast<int32_t>(std::min<int64_t>(topk_, num_nodes_));
    edge_ = num_live_ > pool_size_ ? static_cast<int32_t>(pool_size_) : num_nodes_ + 1;
    tau_ = end.tau;
    last_one_ = static_cast<int32_t>(end.threshold.num_ones);
    last_support_ = static_cast<int32_t>(end.threshold.num_support);
    num_ones_ = last_one_;
    num_fractional_ = last_support_ - last_one_;
    sum_ = 0;
    for (int32_t node = last_one_ + 1; node <= last_support_; ++node) sum_ += score_[node];
    changed_ = false;
    const auto first = score_.begin() + 1, last = first + std::min(edge_, num_nodes_);
    full_ = static_cast<int32_t>(std::partition_point(first, last, [&](T u) { return u - tau_ >= 1; }) - first);
    positive_ = static_cast<int32_t>(std::partition_point(first, last, [&](T u) { return u - tau_ > 0; }) - first);
  }

  // Lowers tau from breakpoint to breakpoint after keys have been taken out (as sparsek_threshold does from above).
  void update_tau(T least) {
    changed_ = false;
    constexpr double kNone = -std::numeric_limits<double>::infinity();
    if (std::min(num_live_, pool_size_) <= topk_) {
      tau_ = -std::numeric_limits<T>::infinity();
      return;
    }
    const auto wanted = static_cast<double>(topk_);
    for (;;) {
      const int32_t entering = next_[last_support_];
      const double enters = entering <= edge_ ? double{score_[entering]} : kNone;
      const double fills = num_fractional_ > 0 ? double{score_[next_[last_one_]]} - 1 : kNone;
      const double rest = num_fractional_ > 0 ? static_cast<double>(num_fractional_) * std::max(enters, fills) : 0;
      if (sum_ + static_cast<double>(num_ones_) - rest >= wanted) break;
      if (enters == kNone && fills == kNone) break;  // only when scores overflow
      if (enters >= fills) {
        last_support_ = entering;
        ++num_fractional_;
        sum_ += score_[entering];
      } else {
        last_one_ = next_[last_one_];
        ++num_ones_;
        take_from_sum(score_[last_one_]);
      }
    }
    const double tau = num_fractional_ > 0
                           ? (sum_ + static_cast<double>(num_ones_ - topk_)) / static_cast<double>(num_fractional_)
                           : double{score_[last_one_]} - 1;
    tau_ = std::max(std::min(static_cast<T>(tau), tau_), least);
  }

  void take_from_sum(T score) {
    sum_ = --num_fractional_ == 0 ? 0 : sum_ - score;  // an empty sum is exact
  }

  // Keys that have p = 1 (p > 0 inside the pool) now and had not at `later`, in the arithmetic of the gate.
  void move_boundaries(int32_t later) {
    for (int32_t node = next_[full_]; node <= edge_ && score_[node] - tau_ >= 1; node = next_[node]) {
      lane_->frac_begin[key_[node]] = later;
      full_ = node;
    }
    for (int32_t node = next_[positive_]; node <= edge_ && score_[node] - tau_ > 0; node = next_[node]) {
      lane_->frac_end[key_[node]] = later;
      positive_ = node;
    }
  }

  // At the lane's first time: carried keys that are fractional or gone from the start.
  void open_carried(int64_t num_carried) {
    for (int32_t node = next_[full_]; node <= num_nodes_; node = next_[node]) {
      const int32_t key = key_[node];
      if (key >= num_carried) continue;
      lane_->frac_begin[key] = 0;
      if (node > positive_) lane_->frac_end[key] = 0;
    }
  }

  // Un-arrives the key that arrived at `time`.
  void remove(int32_t node, int32_t time) {
    const int32_t key = key_[node], before = previous_[node];
    if (num_live_ > topk_) {
      if (node <= kth_) {
        kth_ = next_[kth_];  // the key that this arrival pushed out returns
        lane_->expiry[key_[kth_]] = time;
      } else {
        lane_->expiry[key] = time;
      }
    }
    if (num_live_ > pool_size_ && node <= edge_) edge_ = next_[edge_];
    if (--num_live_ <= pool_size_) edge_ = num_nodes_ + 1;

    if (node > full_) lane_->frac_begin[key] = time;
    if (node > positive_) lane_->frac_end[key] = time;
    if (node == full_) full_ = before;
    if (node == positive_) positive_ = before;

    if (node <= last_support_) {
      changed_ = true;
      if (node <= last_one_) {
        --num_ones_;
      } else {
        take_from_sum(score_[node]);
      }
      if (node == last_one_) last_one_ = before;
      if (node == last_support_) last_support_ = before;
    }
    changed_ |= num_live_ == topk_;
    next_[before] = next_[node];
    previous_[next_[node]] = before;
  }

  const Lane<T>* lane_ = nullptr;
  int64_t topk_ = 0, pool_size_ = 0;
  std::vector<T> score_;
  std::vector<int32_t> next_, previous_, key_, arrival_node_;  // arrival_node_: stretch's arrival -> node
  int32_t num_nodes_ = 0;
  int64_t num_live_ = 0;
  int32_t kth_ = 0, edge_ = 0;  // the topk-th and pool_size-th live node; edge_ is the end while all are in the pool
  // S = live nodes up to last_one_, F = those after it up to last_support_, in double (eq. 2).
  int32_t last_one_ = 0, last_support_ = 0;
  int64_t num_ones_ = 0, num_fractional_ = 0;
  double sum_ = 0;
  bool changed_ = false;
  T tau_ = 0;
  int32_t full_ = 0, positive_ = 0;  // last live node with p = 1, and with p > 0 in the pool, by the rounded tau
};

}  // namespace

template <class T>
bool select_lanes(std::span<Lane<T>> lanes, int64_t topk, int64_t pool_size) {
  assert(topk >= 1 && (pool_size == 0 || pool_size > topk));
  std::vector<LaneWork<T>> work(lanes.size());
  std::vector<Job> jobs;
  for (size_t l = 0; l < lanes.size(); ++l) {
    const Lane<T>& lane = lanes[l];
    work[l].stretch = stretch_length(lane.num_arrivals, lane.num_carried, pool_size);
    const int64_t num_stretches = work[l].num_stretches(lane);
    work[l].sorted.resize(lane.num_arrivals + num_stretches);
    for (int64_t c = 0; c < num_stretches; ++c) jobs.push_back({static_cast<int64_t>(l), c});
  }
  const auto num_jobs = static_cast<int64_t>(jobs.size());

  std::atomic<bool> finite = true;
  std::vector<RankSorter<T>> sorters(omp_get_max_threads());
  parallel_for(num_jobs, [&](int64_t j) {
    const auto [l, c] = jobs[j];
    if (!sort_stretch(lanes[l], work[l], c, sorters[omp_get_thread_num()])) finite = false;
  });
  if (!finite) return false;

  parallel_for(static_cast<int64_t>(lanes.size()), [&](int64_t l) { scan_pools(lanes[l], work[l], topk, pool_size); });

  std::vector<BackwardWalk<T>> walks(omp_get_max_threads());
  parallel_for(num_jobs, [&](int64_t j) {
    const auto [l, c] = jobs[j];
    walks[omp_get_thread_num()].run(lanes[l], work[l], c, topk, pool_size);
  });
  for (size_t l = 0; l < lanes.size(); ++l) {
    lanes[l].final_pool = std::move(work[l].states.back().pool);
    lanes[l].final_pool.pop_back();
  }
  return true;
}

template bool select_lanes(std::span<Lane<float>> lanes, int64_t topk, int64_t pool_size);
template bool select_lanes(std::span<Lane<double>> lanes, int64_t topk, int64_t pool_size);

}  // namespace sparsek::cpu
