// eq. 7-9 for one run of query tiles, float32 and bfloat16: S = Q K^T by blocks of packed keys, softmax with a running
// maximum, O += P V. Logits are kept in units of log 2. Does not choose the runs, and knows no threads (attention.cc).
#include <math.h>

#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/attention/query_tile.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kBlockPanels = 8;  // 256 keys: 1 to 5 % faster than 64 or 128, as is 24 rows
constexpr int kGroupRows = 24;   // that pass together; their logits and outputs stay in L1
constexpr int kBlockKeys = kBlockPanels * kPanelKeys;
// A row's exponentials are taken relative to the maximum of its first block, which holds its own key. Where a later key
// is so much larger that the sum passes this limit, the tile is computed again with a running maximum.
constexpr float kLargestSum = 1e15f;

template <class T>
struct Scratch {
  Scratch(Arena* arena, const AttentionFwdParams& p, const RunPlan& plan)
      : group_heads(p.num_heads / p.num_kv_heads), rows(plan.tile_queries * group_heads) {
    q = arena->take<T>(rows * p.head_dim);
    q_far = p.q_far ? arena->take<T>(rows * p.head_dim) : q;
    out = arena->take<float>(rows * padded(p.head_dim));
    row_max = arena->take<float>(rows);
    row_tau = arena->take<float>(rows);
    row_sum = arena->take<float>(rows * kLanes);
    fits = arena->take<bool>(rows);
    positions = arena->take<QueryPosition>(plan.tile_queries);
    logits = arena->take<float>(kGroupRows * kBlockKeys);
    probabilities = arena->take<T>(kGroupRows * kBlockKeys);
  }
  int group_heads, rows;
  T *q, *q_far;
  float *out, *row_max, *row_tau, *row_sum;  // row_sum: kLanes partial sums a row
  bool* fits;
  QueryPosition* positions;
  float* logits;     // [kGroupRows][kBlockKeys]
  T* probabilities;  // [kGroupRows][kBlockKeys], gated
};

SPARSEK_INLINE void store_as(float* to, VecF x) {
  store(to, x);
}
SPARSEK_INLINE void store_as(BFloat16* to, VecF x) {
  store_bf16(to, x);
}

// What the rows of a block share.
struct Block {
  int first, count;  // panels
  bool is_masked, is_gated;
  bool takes_maximum;
};

// Exponentials of a block without masks whose rows have their maximum, while they are in registers.
template <class T, bool kGated>
struct StoreExponentials {
  template <int kRows, int kVectors>
  SPARSEK_INLINE void operator()(const VecF (&acc)[kRows][kVectors], int row, int column) const {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF shift = splat(row_max[row + r]);
      VecF sum = load(row_sum + (row + r) * kLanes);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        VecF e = exp2_of<T>(acc[r][v] * alpha - shift);
        sum += e;
        if constexpr (kGated) {
          const int at = column + v * kLanes;
          const VecF weight = load(slot_score + info[at / kPanelKeys].first + at % kPanelKeys) - row_tau[row + r];
          e = e * min(max(weight, splat(0.0f)), splat(1.0f));
        }
        store_as(probabilities + (row + r) * kBlockKeys + column + v * kLanes, e);
      }
      store(row_sum + (row + r) * kLanes, sum);
    }
  }
  float alpha;
  const float *row_max, *row_tau, *slot_score;
  const PanelInfo* info;
  float* row_sum;
  T* probabilities;
};

// One row of a block: takes the maximum where it must, masks, adds to the sum, writes gated probabilities.
template <class T>
SPARSEK_INLINE void softmax_row(const Keys<T>& keys, const Block& block, const QueryPosition& position, float alpha,
                                const float* logits, T* probabilities, float* row_max, float* row_sum, float* out,
                                int padded_dim) {
  if (block.takes_maximum) {
    const float block_max = block_maximum(logits, alpha, keys, block.first, block.count, position);
    if (block_max > *row_max) {
      const VecF factor = exp2_of<float>(splat(*row_max - block_max));
      *row_max = block_max;
      store(row_sum, load(row_sum) * factor);
      for (int c = 0; c < padded_dim; c += kLanes) store(out + c, load(out + c) * factor);
    }
  }
  const VecF shift = splat(*row_max), tau = splat(position.tau);
  VecF sum = load(row_sum);
  for (int n = 0; n < block.count; ++n) {
    const PanelInfo panel = keys.info[block.first + n];
    for (int column = 0; column < kPanelKeys; column += kLanes) {
      VecF e = exp2_of<T>(scaled_logits(logits + n * kPanelKeys, alpha, shift, keys, panel, column, position));
      sum += e;
      if (panel.is_gated) {
        const VecF weight = load(keys.slot_score + panel.first + column) - tau;
        e = e * min(max(weight, splat(0.0f)), splat(1.0f));
      }
      store_as(probabilities + n * kPanelKeys + column, e);
    }
  }
  store(row_sum, sum);
}

// All panels of a tile, the newest first.
template <class T>
void tile_blocks(const AttentionFwdParams& p, const Scratch<T>& s, const Keys<T>& keys, int rows, bool running_maximum,
                 RowPrefetch<T>* prefetch) {
  const int head_dim = p.head_dim, padded_dim = padded(head_dim), group_heads = s.group_heads;
  const float alpha = static_cast<float>(p.softmax_scale * 1.4426950408889634);
  for (int r = 0; r < rows; ++r) s.row_max[r] = kNothing;
  std::memset(s.row_sum, 0, static_cast<size_t>(rows) * kLanes * sizeof(float));
  std::memset(s.out, 0, static_cast<size_t>(rows) * padded_dim * sizeof(float));
  for (int end = keys.num_panels; end > 0;) {
    const bool is_far = keys.info[end - 1].is_far;
    Block block{};
    block.first = block_begin(keys, end, kBlockPanels);
    block.count = end - block.first;
    block.takes_maximum = running_maximum || end == keys.num_panels;
    for (int n = block.first; n < end; ++n) {
      block.is_masked |= keys.info[n].is_masked;
      block.is_gated |= keys.info[n].is_gated;
    }
    end = block.first;
    const T* q = is_far ? s.q_far : s.q;
    for (int r = 0; r < rows; r += kGroupRows) {
      const int group = rows - r < kGroupRows ? rows - r : kGroupRows;
      prefetch->some(group / 2);
      const T* q_group = q + r * head_dim;
      const T* const* k_columns = keys.k_columns + block.first;
      if (!block.is_masked && !block.takes_maximum) {
        float* row_sum = s.row_sum + r * kLanes;
        if (block.is_gated) {
          multiply_columns(q_group, head_dim, group, head_dim, k_columns, block.count,
                           StoreExponentials<T, true>{alpha, s.row_max + r, s.row_tau + r, keys.slot_score,
                                                      keys.info + block.first, row_sum, s.probabilities});
        } else {
          multiply_columns(
              q_group, head_dim, group, head_dim, k_columns, block.count,
              StoreExponentials<T, false>{alpha, s.row_max + r, nullptr, nullptr, nullptr, row_sum, s.probabilities});
        }
      } else {
        multiply_columns(q_group, head_dim, group, head_dim, k_columns, block.count,
                         StoreScaled{s.logits, kBlockKeys, 1.0f});
        for (int n = 0; n < group; ++n) {
          const int row = r + n;
          softmax_row(keys, block, s.positions[row / group_heads], alpha, s.logits + n * kBlockKeys,
                      s.probabilities + n * kBlockKeys, s.row_max + row, s.row_sum + row * kLanes,
                      s.out + row * padded_dim, padded_dim);
        }
      }
      multiply_rows(s.probabilities, kBlockKeys, kStep<T>, group, keys.v_rows + block.first, block.count, kPanelKeys,
                    padded_dim, s.out + r * padded_dim, padded_dim);
    }
  }
}

template <class T>
void run(const AttentionFwdParams& p, const RunPlan& plan, char* memory) {
  Arena arena(memory);
  const Scratch<T> s(&arena, p, plan);
  Keys<T> keys(&arena, plan, p.head_dim, {.v_rows = true, .v_columns = false, .k_rows = false});
  const int b = plan.batch, kv = plan.kv_head, first_head = kv * s.group_heads, padded_dim = padded(p.head_dim);
  const int64_t head_row = static_cast<int64_t>(b) * p.num_kv_heads + kv;
  const bool soft = p.gate == Gate::kSoft;
  const auto at = [&](const void* base, const Strides& strides, int head) {
    return static_cast<const T*>(base) + b * strides.batch + head * strides.head;
  };
  const T *q = at(p.q, p.q_strides, first_head), *q_far = p.q_far ? at(p.q_far, p.q_far_strides, first_head) : nullptr;
  const float* tau = static_cast<const float*>(p.tau) + head_row * p.seqlen_q;
  const int32_t* window_begin = p.window_begin + static_cast<int64_t>(b) * p.seqlen_q;

  keys.begin_run(plan, key_source<T>(p, plan));
  for (int t = 0; t < plan.num_tiles; ++t) {
    const int32_t first = plan.first_query + t * plan.tile_queries;
    const int32_t end = first + plan.tile_queries < plan.end_query ? first + plan.tile_queries : plan.end_query;
    const int queries = end - first, rows = queries * s.group_heads;
    float tau_max = -__builtin_inff();
    for (int n = 0; n < queries; ++n) {
      const int32_t i = first + n;
      s.positions[n] = {i, window_begin[i], p.num_carried + i, soft ? tau[i] : 0.0f};
      for (int g = 0; g < s.group_heads; ++g) s.row_tau[n * s.group_heads + g] = s.positions[n].tau;
      if (soft && tau[i] > tau_max) tau_max = tau[i];
    }
    keys.begin_tile(plan, t, s.positions[0].window_begin, s.positions[queries - 1].window_begin, first, end - 1,
                    tau_max);
    gather_rows(q + first * p.q_strides.seq, p.q_strides.seq, p.q_strides.head, queries, s.group_heads, p.head_dim,
                s.q);
    if (q_far) {
      gather_rows(q_far + first * p.q_far_strides.seq, p.q_far_strides.seq, p.q_far_strides.head, queries,
                  s.group_heads, p.head_dim, s.q_far);
    }
    const int rows_ahead = (plan.end_query - end < queries ? plan.end_query - end : queries) * s.group_heads;
    RowPrefetch<T> prefetch{
        q + end * p.q_strides.seq, p.q_strides.seq, p.q_strides.head, rows_ahead, s.group_heads, p.head_dim};
    tile_blocks(p, s, keys, rows, false, &prefetch);
    const auto row_total = [&](int r) { return reduce_add(load(s.row_sum + r * kLanes)); };
    const auto write = [&](int r) {
      const int64_t i = first + r / s.group_heads, head = first_head + r % s.group_heads;
      const float sum = row_total(r);
      T* out = static_cast<T*>(p.out) + b * p.out_strides.batch + i * p.out_strides.seq + head * p.out_strides.head;
      write_row(out, s.out + r * padded_dim, sum > 0 ? 1 / sum : 0.0f, p.head_dim);
      static_cast<float*>(p.softmax_lse)[(static_cast<int64_t>(b) * p.num_heads + head) * p.seqlen_q + i] =
          sum > 0 ? static_cast<float>(s.row_max[r] * 0.6931471805599453 + logf(sum)) : -__builtin_inff();
    };
    bool all_fit = true;
    for (int r = 0; r < rows; ++r) {
      s.fits[r] = row_total(r) < kLargestSum;
      all_fit &= s.fits[r];
      if (s.fits[r]) write(r);
    }
    if (all_fit) continue;
    tile_blocks(p, s, keys, rows, true, &prefetch);
    for (int r = 0; r < rows; ++r) {
      if (!s.fits[r]) write(r);
    }
  }
}

template <class T>
size_t scratch_bytes(const AttentionFwdParams& p, const RunPlan& plan) {
  Arena arena(nullptr);
  Scratch<T>(&arena, p, plan);
  Keys<T>(&arena, plan, p.head_dim, {.v_rows = true, .v_columns = false, .k_rows = false});
  return arena.used_bytes();
}

}  // namespace

size_t forward_scratch_bytes(const AttentionFwdParams& p, const RunPlan& plan) {
  return p.dtype == DType::kBF16 ? scratch_bytes<BFloat16>(p, plan) : scratch_bytes<float>(p, plan);
}
void forward_run(const AttentionFwdParams& p, const RunPlan& plan, char* scratch) {
  p.dtype == DType::kBF16 ? run<BFloat16>(p, plan, scratch) : run<float>(p, plan, scratch);
}

}  // namespace sparsek::cpu::SPARSEK_ISA
