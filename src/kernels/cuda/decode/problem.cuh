// What the kernels of a decode step share: sizes, the workspace, and what a step changes in a state.
//
// A unit is one (batch row, KV head). Its rows are cut into tiles of 16: sinks, then the ring, then the slots, each
// padded to whole tiles. A split is a range of tiles that one CTA attends. Two launches:
//   1. attend.cuh: reads the state only. Every CTA that meets slots finds out by itself what the candidate does to the
//      pool and the slots (plan.cuh), since gates depend on it; partial results go to the workspace.
//   2. apply.cuh: merges the splits and changes the state.
#pragma once
#include <cstdint>

#include "kernels/cuda/decode/decode_step.h"

namespace sparsek::cuda::decode {

constexpr int kTileRows = 16;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxSplits = 64, kMaxGroup = 64;
constexpr int kHeadTile = 8;  // heads of an mma
using Plan = DecodePlan;

// Of one query head over one split, base-2 logits.
struct Stats {
  float maximum, sum;            // of logits; of 2^(logit - maximum)
  float near_maximum, near_sum;  // without the slots
};

struct Problem {
  DecodeStepParams params;
  Plan* plans;    // [units]
  Stats* stats;   // [units, num_splits, group]
  float* values;  // [units, num_splits, group, head_dim] sums of 2^(logit - maximum) gate v
  float* logits;  // [units, group, window_size] base 2, of the ring's older half; null without ring_mass
  int32_t group, head_parts, num_splits, tiles_per_split;
  int32_t sink_tiles, first_slot_tile, num_tiles;
  int32_t older_age;  // of the youngest key of the window's older half (eq. 1b)
  float scale_log2;   // softmax_scale in base 2

  __host__ __device__ int units() const { return params.batch * params.num_kv_heads; }
  __device__ int64_t state_rows() const { return int64_t{params.num_sinks} + params.window_size + params.topk; }
  __device__ float* pool(int unit) const {
    return static_cast<float*>(params.pool_scores) + int64_t{unit} * params.pool_size;
  }
  __device__ float* slot_scores(int unit) const {
    return static_cast<float*>(params.slot_scores) + int64_t{unit} * params.topk;
  }
  __device__ int64_t* slot_positions(int unit) const { return params.slot_positions + int64_t{unit} * params.topk; }
  // The score of the key that leaves the window.
  __device__ float candidate_score(int unit, int new_row) const {
    if (params.candidate_scores) return static_cast<const float*>(params.candidate_scores)[unit];
    return static_cast<const float*>(params.ring_scores)[int64_t{unit} * params.window_size + new_row];
  }
};

// Where position `length` goes in a ring; 64-bit remainders are slow.
__device__ __forceinline__ int ring_row(int64_t length, int window_size) {
  return length <= INT32_MAX ? static_cast<int>(length) % window_size : static_cast<int>(length % window_size);
}

// 16-byte pieces of a row of 16-bit elements.
template <class T>
__device__ __forceinline__ const uint16_t* row_of(const T* tensor, int64_t batch_row, int64_t batch_stride,
                                                  int64_t head, int64_t head_stride) {
  return static_cast<const uint16_t*>(static_cast<const void*>(tensor)) + batch_row * batch_stride + head * head_stride;
}

}  // namespace sparsek::cuda::decode
