// The vector part of a decode step: attention of one token's query heads over a tile of state rows, and the merge of
// the tiles. Tiles depend on the sizes alone, so results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "base/dtype.h"

namespace sparsek::cpu {

inline constexpr int32_t kTileRows = 128;
inline constexpr int32_t kStatsPadding = 16;  // per-head arrays over tiles are padded to a multiple of this

// All heads of a group over up to kTileRows rows that share q, k and kind.
struct Tile {
  const void* q;         // [group, head_dim], heads q_head_stride apart
  const void *k, *v;     // [rows, head_dim]
  const float* gates;    // [rows, readable to a multiple of 16] or null: 1
  float* probabilities;  // [group, rows], heads probabilities_stride apart: exp(logit - maximum) without gate; or null
  float* maximum;        // [group], heads stats_stride apart: of softmax_scale <q, k>
  float* sum;            // likewise: sum of exp(logit - maximum)
  float* values;         // [group, head_dim], heads values_stride apart: sum of exp(logit - maximum) gate v
  int64_t q_head_stride, probabilities_stride, stats_stride, values_stride;
  int32_t rows, group, head_dim;
  float softmax_scale;
};

// One query head: from tiles to out and log-sum-exps.
struct TileMerge {
  DType out_dtype;
  const float* maximum;  // [num_tiles], padded with -inf
  const float* sum;      // [num_tiles], padded with 0
  const float* values;   // [num_tiles, head_dim], tiles values_stride apart
  float* factors;        // [num_tiles, padded] scratch: exp(maximum - overall maximum)
  float*
      window_factors;  // [num_window_tiles, padded]: exp(maximum - lse over the first num_window_tiles tiles); or null
  void* out;           // [head_dim]
  float* softmax_lse;  // or null
  int64_t values_stride;
  int32_t num_tiles, num_window_tiles, head_dim;
};

#define SPARSEK_DECLARE_TILES(isa)    \
  namespace isa {                     \
  void attend_tile_bf16(const Tile&); \
  void attend_tile_f32(const Tile&);  \
  void merge_tiles(const TileMerge&); \
  }
SPARSEK_DECLARE_TILES(portable)
SPARSEK_DECLARE_TILES(avx2)
SPARSEK_DECLARE_TILES(avx512)
#undef SPARSEK_DECLARE_TILES

}  // namespace sparsek::cpu
