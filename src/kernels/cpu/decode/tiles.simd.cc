// attend_tile and merge_tiles: see tiles.h. Logits are dot products along head_dim, kLanes rows at once, each K row
// loaded for all heads of the group while it is in L1; values are accumulated for up to four heads per load of a V row.
// bfloat16 products are exact pairs added in float32; probabilities stay float32.
#include "kernels/cpu/decode/tiles.h"

#include <cassert>
#include <cmath>
#include <utility>

#include "kernels/cpu/simd/vec.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kMaxHeads = 4;  // heads whose sums of values share the registers
constexpr int kPrefetchRows = 32;
static_assert(kTileRows % kLanes == 0 && kStatsPadding % kLanes == 0);

template <int kBlock>
constexpr int low_lane(int i) {
  const int within = i % (2 * kBlock), base = i - within;
  return within < kBlock ? base + within : kLanes + base + within - kBlock;
}
// Sums of neighbouring blocks of kBlock lanes, those of a and of b in turns.
template <int kBlock, int... kIndex>
SPARSEK_INLINE VecF add_blocks(VecF a, VecF b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, low_lane<kBlock>(kIndex)...) +
         __builtin_shufflevector(a, b, (low_lane<kBlock>(kIndex) + kBlock)...);
}
template <int kBlock = 1>
SPARSEK_INLINE VecF reduce_each(VecF* x) {
  constexpr int kPairs = kLanes / kBlock / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i) {
    x[i] = add_blocks<kBlock>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (kPairs > 1) {
    return reduce_each<2 * kBlock>(x);  // lane r: the sum over the lanes of the r-th vector
  } else {
    return x[0];
  }
}

// How a type is loaded kStep elements at a time, multiplied, and widened into kParts vectors.
struct Bf16 {
  using Element = BFloat16;
  using Vec = VecBF;
  static constexpr int kStep = 2 * kLanes, kParts = 2;
  static SPARSEK_INLINE Vec load_step(const Element* p) { return load_pairs(p); }
  static SPARSEK_INLINE VecF dot(VecF sum, Vec x, Vec y) { return dot_bf16(sum, x, y); }
  static SPARSEK_INLINE void widen(Vec x, VecF* parts) {  // even elements, odd elements
    const VecU bits = (VecU)x.bits;
    parts[0] = (VecF)(bits << 16);
    parts[1] = (VecF)(bits & 0xffff0000u);
  }
  template <int... kIndex>
  static SPARSEK_INLINE void interleave(const VecF* parts, float* out, std::integer_sequence<int, kIndex...>) {
    store(out, __builtin_shufflevector(parts[0], parts[1], (kIndex / 2 + kIndex % 2 * kLanes)...));
    store(out + kLanes,
          __builtin_shufflevector(parts[0], parts[1], (kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...));
  }
  static SPARSEK_INLINE void store_parts(const VecF* parts, float* out) {
    interleave(parts, out, std::make_integer_sequence<int, kLanes>());
  }
};
struct F32 {
  using Element = float;
  using Vec = VecF;
  static constexpr int kStep = kLanes, kParts = 1;
  static SPARSEK_INLINE Vec load_step(const Element* p) { return load(p); }
  static SPARSEK_INLINE VecF dot(VecF sum, Vec x, Vec y) { return sum + x * y; }
  static SPARSEK_INLINE void widen(Vec x, VecF* parts) { parts[0] = x; }
  static SPARSEK_INLINE void store_parts(const VecF* parts, float* out) { store(out, parts[0]); }
};

template <class Type>
SPARSEK_INLINE typename Type::Vec load_partial(const typename Type::Element* p, int count) {
  typename Type::Element step[Type::kStep] = {};
  std::memcpy(step, p, sizeof(typename Type::Element) * count);
  return Type::load_step(step);
}

// <q, k_r> for kLanes rows; rows after last_row repeat it.
template <class Type, bool kAllRows>
SPARSEK_INLINE VecF dot_rows(const typename Type::Element* q, const typename Type::Element* k, int head_dim,
                             int last_row) {
  VecF sums[kLanes] = {};
  int c = 0;
  for (; c + Type::kStep <= head_dim; c += Type::kStep) {
    const auto q_step = Type::load_step(q + c);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = kAllRows || r < last_row ? r : last_row;
      sums[r] = Type::dot(sums[r], Type::load_step(k + row * head_dim + c), q_step);
    }
  }
  if (c < head_dim) {
    const auto q_step = load_partial<Type>(q + c, head_dim - c);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = kAllRows || r < last_row ? r : last_row;
      sums[r] = Type::dot(sums[r], load_partial<Type>(k + row * head_dim + c, head_dim - c), q_step);
    }
  }
  return reduce_each(sums);
}

// Asks for the rows' cache lines. Hardware prefetch starts anew at every 4 KiB page, which is 32 rows at head_dim 64.
SPARSEK_INLINE void prefetch(const void* begin, int64_t size_bytes) {
  for (int64_t byte = 0; byte < size_bytes; byte += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + byte, 0, 3);
}

// values[head, c .. c + kSteps * kStep) = sum over rows of weights[head, row] v[row, c ..); count < kStep: a partial
// step.
template <class Type, int kHeads, int kSteps>
SPARSEK_INLINE void weigh_steps(const typename Type::Element* v, const float* weights, int rows, int head_dim,
                                float* values, int64_t values_stride, int count = Type::kStep) {
  constexpr int kVecs = kSteps * Type::kParts;
  VecF sums[kHeads][kVecs] = {};
  for (int64_t row = 0; row < rows; ++row) {
    VecF parts[kVecs];
    for (int step = 0; step < kSteps; ++step) {
      const auto* at = v + row * head_dim + step * Type::kStep;
      Type::widen(count < Type::kStep ? load_partial<Type>(at, count) : Type::load_step(at),
                  parts + step * Type::kParts);
    }
    for (int head = 0; head < kHeads; ++head) {
      const VecF weight = splat(weights[head * kTileRows + row]);
      for (int i = 0; i < kVecs; ++i) sums[head][i] += weight * parts[i];
    }
  }
  for (int head = 0; head < kHeads; ++head) {
    float* out = values + head * values_stride;
    if (count < Type::kStep) {
      float step[Type::kStep];
      Type::store_parts(sums[head], step);
      std::memcpy(out, step, sizeof(float) * count);
      continue;
    }
    for (int step = 0; step < kSteps; ++step) {
      Type::store_parts(sums[head] + step * Type::kParts, out + step * Type::kStep);
    }
  }
}

template <class Type, int kHeads>
void weigh_values(const Tile& tile, const float* weights, float* values) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;  // per head: 16 or 8 registers of sums in all
  constexpr int kSteps = kVecs / Type::kParts;
  const auto* v = static_cast<const typename Type::Element*>(tile.v);
  int c = 0;
  for (; c + kSteps * Type::kStep <= tile.head_dim; c += kSteps * Type::kStep) {
    weigh_steps<Type, kHeads, kSteps>(v + c, weights, tile.rows, tile.head_dim, values + c, tile.values_stride);
  }
  for (; c + Type::kStep <= tile.head_dim; c += Type::kStep) {
    weigh_steps<Type, kHeads, 1>(v + c, weights, tile.rows, tile.head_dim, values + c, tile.values_stride);
  }
  if (c < tile.head_dim) {
    weigh_steps<Type, kHeads, 1>(v + c, weights, tile.rows, tile.head_dim, values + c, tile.values_stride,
                                 tile.head_dim - c);
  }
}

// Logits in, exp(logit - maximum) times gate out.
SPARSEK_INLINE void softmax_row(const Tile& tile, int head, VecF largest, float* weights) {
  const float maximum = reduce_max(largest);
  VecF sums = {};
  for (int row = 0; row < tile.rows; row += kLanes) {
    const VecF probability = exp(load(weights + row) - maximum);
    sums += probability;
    store(weights + row, probability);
  }
  tile.maximum[head * tile.stats_stride] = maximum;
  tile.sum[head * tile.stats_stride] = reduce_add(sums);
  if (tile.probabilities != nullptr) {
    std::memcpy(tile.probabilities + head * tile.probabilities_stride, weights, sizeof(float) * tile.rows);
  }
  if (tile.gates != nullptr) {
    for (int row = 0; row < tile.rows; row += kLanes)
      store(weights + row, load(weights + row) * load(tile.gates + row));
  }
}

template <class Type>
void attend_tile(const Tile& tile) {
  using Element = typename Type::Element;
  assert(tile.rows > 0 && tile.rows <= kTileRows);
  alignas(64) float weights[kMaxHeads * kTileRows];
  for (int first = 0; first < tile.group; first += kMaxHeads) {
    const int heads = tile.group - first < kMaxHeads ? tile.group - first : kMaxHeads;
    const Element* q = static_cast<const Element*>(tile.q) + first * tile.q_head_stride;
    const Element* k = static_cast<const Element*>(tile.k);
    const Element* v = static_cast<const Element*>(tile.v);
    const int64_t block_bytes = sizeof(Element) * kLanes * tile.head_dim;
    VecF largest[kMaxHeads];
    for (VecF& x : largest) x = splat(-INFINITY);
    int row = 0;
    for (; row + kLanes <= tile.rows; row += kLanes, k += int64_t{kLanes} * tile.head_dim) {
      // The values of this tile, and keys ahead (of the next tile of the run at last; past its end nothing is fetched).
      // SmolLM2's shape on state that does not fit L2, two threads: 35 us a call without, 23 with both.
      prefetch(v + int64_t{row} * tile.head_dim, block_bytes);
      prefetch(k + int64_t{kPrefetchRows} * tile.head_dim, block_bytes);
      for (int head = 0; head < heads; ++head) {
        const VecF logits =
            dot_rows<Type, true>(q + head * tile.q_head_stride, k, tile.head_dim, kLanes - 1) * tile.softmax_scale;
        largest[head] = max(largest[head], logits);
        store(weights + head * kTileRows + row, logits);
      }
    }
    if (row < tile.rows) {
      VecI lane;
      for (int i = 0; i < kLanes; ++i) lane[i] = i;
      for (int head = 0; head < heads; ++head) {
        const VecF dots = dot_rows<Type, false>(q + head * tile.q_head_stride, k, tile.head_dim, tile.rows - row - 1);
        const VecF logits = select((VecI)(lane < tile.rows - row), dots * tile.softmax_scale, splat(-INFINITY));
        largest[head] = max(largest[head], logits);
        store(weights + head * kTileRows + row, logits);
      }
    }
    for (int head = 0; head < heads; ++head) {
      softmax_row(tile, first + head, largest[head], weights + head * kTileRows);
    }
    float* values = tile.values + first * tile.values_stride;
    switch (heads) {
      case 1:
        weigh_values<Type, 1>(tile, weights, values);
        break;
      case 2:
        weigh_values<Type, 2>(tile, weights, values);
        break;
      case 3:
        weigh_values<Type, 3>(tile, weights, values);
        break;
      default:
        weigh_values<Type, 4>(tile, weights, values);
    }
  }
}

// factors[t] = exp(maximum[t] - the largest); returns {the largest, sum of factors[t] sum[t]}.
struct LogSum {
  float maximum, sum;
};
SPARSEK_INLINE LogSum tile_factors(const float* maximum, const float* sum, int num_tiles, float* factors) {
  float largest = maximum[0];
  for (int t = 1; t < num_tiles; ++t) largest = maximum[t] > largest ? maximum[t] : largest;
  VecF sums = {};
  for (int t = 0; t < num_tiles; t += kLanes) {
    const VecF factor = exp(load(maximum + t) - largest);
    store(factors + t, factor);
    VecF part = factor * load(sum + t);
    for (int lane = num_tiles - t; lane < kLanes; ++lane) part[lane] = 0;  // other tiles, or none
    sums += part;
  }
  return {largest, reduce_add(sums)};
}

}  // namespace

void attend_tile_bf16(const Tile& tile) {
  attend_tile<Bf16>(tile);
}
void attend_tile_f32(const Tile& tile) {
  attend_tile<F32>(tile);
}

void merge_tiles(const TileMerge& merge) {
  if (merge.window_factors != nullptr) {
    const LogSum window = tile_factors(merge.maximum, merge.sum, merge.num_window_tiles, merge.window_factors);
    for (int t = 0; t < merge.num_window_tiles; ++t) merge.window_factors[t] /= window.sum;
  }
  const LogSum all = tile_factors(merge.maximum, merge.sum, merge.num_tiles, merge.factors);
  if (merge.softmax_lse != nullptr) *merge.softmax_lse = all.maximum + std::log(all.sum);
  const float inverse = 1.0f / all.sum;
  for (int c = 0; c < merge.head_dim; c += kLanes) {
    VecF sum = {};
    for (int64_t t = 0; t < merge.num_tiles; ++t) {
      sum += load(merge.values + t * merge.values_stride + c) * merge.factors[t];
    }
    sum *= inverse;
    const int count = merge.head_dim - c < kLanes ? merge.head_dim - c : kLanes;
    if (merge.out_dtype == DType::kBF16) {
      BFloat16 rounded[kLanes];
      store_bf16(rounded, sum);
      std::memcpy(static_cast<BFloat16*>(merge.out) + c, rounded, sizeof(BFloat16) * count);
    } else {
      std::memcpy(static_cast<float*>(merge.out) + c, &sum, sizeof(float) * count);
    }
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
