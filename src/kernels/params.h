// What every attention operation is given: one plain struct each, shared by the CPU and CUDA kernels and the ops.
//
// Pointers are to the device the kernel runs on; strides count elements; an array without strides is contiguous.
// Equations: docs/math.md. Checked by the caller (ops): dtypes, shapes, strides, ranges, finite scores on the CPU.
//
// Rows. Attention never asks which document, state or chunk a key came from. It sees `seqlen_k` key ROWS per batch row:
//     [ carried rows (num_carried of them) | the queries' own keys (seqlen_q) ]
// Query i's own key is row num_carried + i. A whole sequence carries nothing (num_carried 0). A chunk carries, in this
// order, topk slots, num_sinks sinks and window_size ring rows in the order of their positions. Query i sees
//   * the window: rows [window_begin[i], num_carried + i];
//   * far rows:   rows r with far_begin[r] <= i < far_end[r], never at the same time in the window.
// Everything else (sinks, document boundaries, what is selected) is already in those three arrays
// (VisibilityParams and ChunkVisibilityParams make them).
#pragma once
#include <cstdint>

#include "base/dtype.h"

// clang-format off: each member's shape stands beside it.
namespace sparsek {

enum class Gate : uint8_t { kSoft, kHard };  // weight clamp(u - tau, 0, 1) on selected values, or 1 (eq. 7)

// Strides of a [batch, seqlen, heads, head_dim] tensor whose last dimension is contiguous.
struct Strides {
  int64_t batch = 0, seq = 0, head = 0;
};

// eq. 3-6 for every position of whole sequences. dtype kF32 or kF64 is that of scores and tau.
struct SelectParams {
  DType dtype;
  const void* scores;         // [batch, seqlen, num_kv_heads]  u, finite
  const int32_t* cu_seqlens;  // [num_documents + 1] document starts, first 0, last seqlen; null: one document. batch 1 only
  void* tau;                  // [batch, seqlen, num_kv_heads]  -inf where every weight is 1
  int32_t* expiry;            // [batch, seqlen, num_kv_heads]  fact b; absolute query index
  int32_t* frac_begin;        // [batch, seqlen, num_kv_heads]  fact c: u_j is fractional at queries [begin, end);
  int32_t* frac_end;          //                                begin == end == j + w when it never is
  Strides scores_strides, out_strides;  // (batch, seq, head); the four outputs share out_strides
  int32_t batch, seqlen, num_kv_heads, num_documents;
  int32_t topk, window_size, num_sinks, pool_size;  // pool_size 0: no limit, else > topk
};

// eq. 3-6 for a chunk of `chunk` queries behind a carried state (eq. 12). The key at position
// length + t - window_size becomes a candidate at query t (unless that position is < num_sinks); its score is
// candidate_scores[t]. Query indices count from the chunk's start. Ranks: pool entry r has rank r; ties go to the smaller
// position, so an arrival ranks after every equal carried score.
struct SelectChunkParams {
  DType dtype;
  const void* candidate_scores;   // [batch, chunk, num_kv_heads] u; entries of keys that are no candidates are not read
  const void* slot_scores;        // [batch, num_kv_heads, topk]  u of the selected keys, in any order
  const int64_t* slot_positions;  // [batch, num_kv_heads, topk]  -1: empty slot
  const void* pool_scores;        // [batch, num_kv_heads, pool_capacity] all pool scores, descending; -inf: unused.
                                  //   Its first topk entries are the slots' scores
  const int64_t* lengths;         // [batch] tokens read before this chunk
  void* tau;                      // [batch, chunk, num_kv_heads]
  int32_t *slot_expiry, *slot_frac_begin, *slot_frac_end;           // [batch, num_kv_heads, topk]; empty slot: 0, 0, 0
  int32_t *pool_frac_begin, *pool_frac_end;                         // [batch, num_kv_heads, pool_capacity]; the
                                                                    //   first topk ranks (they are slots): 0, 0
  int32_t *arrival_expiry, *arrival_frac_begin, *arrival_frac_end;  // [batch, num_kv_heads, chunk]; no candidate: t, t, t
  int32_t* new_slot_source;       // [batch, num_kv_heads, topk] in rank order: s < topk old slot s, topk + t arrival t, -1 empty
  int64_t* new_slot_positions;    // [batch, num_kv_heads, topk]
  int32_t* new_pool_source;       // [batch, num_kv_heads, new_pool_capacity] in rank order: p < pool_capacity old entry p,
                                  //   pool_capacity + t arrival t, -1 unused
  Strides scores_strides, tau_strides;  // (batch, seq, head)
  int32_t batch, chunk, num_kv_heads;
  int32_t topk, window_size, num_sinks, pool_size;
  int32_t pool_capacity, new_pool_capacity;  // pool_size > 0: both pool_size; pool_size 0: new = old + chunk
};

// From a selection of whole sequences to the row arrays that attention reads. The inputs are those and the outputs of
// `select`; the outputs are contiguous and head-major as AttentionFwdParams / AttentionBwdParams want them. Sinks get
// the score +inf and are far rows from j + w to their document's end; expiry is clipped to it, and fractions to
// [0, seqlen]. Any output may be null.
struct VisibilityParams {
  DType dtype;                 // of scores and tau
  const void* scores;          // [batch, seqlen, num_kv_heads] by scores_strides
  const void* tau;             // [batch, seqlen, num_kv_heads] by tau_strides
  const int32_t *expiry, *frac_begin, *frac_end;    // [batch, seqlen, num_kv_heads] by index_strides
  const int32_t* cu_seqlens;   // as in SelectParams
  Strides scores_strides, tau_strides, index_strides;  // (batch, seq, head)
  void* row_scores;            // [batch, num_kv_heads, seqlen]
  void* row_tau;               // [batch, num_kv_heads, seqlen]
  int32_t* window_begin;       // [batch, seqlen]
  int32_t *far_begin, *far_end;            // [batch, num_kv_heads, seqlen]
  int32_t *row_frac_begin, *row_frac_end;  // [batch, num_kv_heads, seqlen]
  int32_t batch, seqlen, num_kv_heads, num_documents, window_size, num_sinks;
};

// The same for a chunk, and where every row of the state comes from and goes to (sections 3 and 6). Rows:
//     [ topk slots | num_sinks sinks | window_size ring rows in position order | chunk ]
// Ring row r holds position length - window_size + r (negative: empty), so the key that becomes a candidate at query t,
// "arrival" t, is row topk + num_sinks + t, in the ring or in the chunk alike. The selection's arrays are
// SelectChunkParams' outputs. All arrays are contiguous.
// num_rows = topk + num_sinks + window_size + chunk; num_state_rows = num_sinks + window_size + topk.
struct ChunkVisibilityParams {
  const int64_t* lengths;                                                 // [batch] tokens read before the chunk
  const int32_t *slot_expiry, *slot_frac_begin, *slot_frac_end;           // [batch, num_kv_heads, topk]
  const int32_t *pool_frac_begin, *pool_frac_end;                         // [batch, num_kv_heads, pool_capacity]
  const int32_t *arrival_expiry, *arrival_frac_begin, *arrival_frac_end;  // [batch, num_kv_heads, chunk]
  const int32_t* new_slot_source;                                         // [batch, num_kv_heads, topk]
  int32_t* window_begin;           // [batch, chunk]
  int32_t *far_begin, *far_end;    // [batch, num_kv_heads, num_rows]
  int32_t *frac_begin, *frac_end;  // [batch, num_kv_heads, pool_capacity + num_rows]
  bool* is_sink;                   // [batch, num_rows] rows that are read as sinks, wherever they lie
  int64_t* carried_source;         // [batch, topk + num_sinks + window_size, num_kv_heads] carried row -> row of the
                                   //   state [batch * num_kv_heads * num_state_rows]
  int64_t* state_source;           // [batch, num_kv_heads, num_state_rows] row of the new state -> row of
                                   //   [batch * num_rows * num_kv_heads]; empty slots name any row
  int32_t batch, chunk, num_kv_heads, topk, window_size, num_sinks, pool_capacity;
};

// Rows with window and sinks only, as eq. 1b reads them. With `lengths` the rows are [ num_sinks sinks | window_size
// ring rows in position order | seqlen ]; without, the sequence's own, as documents by `cu_seqlens` (batch 1) if given.
struct WindowRowsParams {
  const int64_t* lengths;        // [batch] or null
  const int32_t* cu_seqlens;     // [num_documents + 1] or null
  int32_t* window_begin;         // [batch, seqlen]
  int32_t *far_begin, *far_end;  // [batch, num_rows]
  int32_t* num_queries;          // [batch, seqlen] how many queries of [j + ceil(w/2), j + w - 1] row j's document has
                                 //   (whole sequences only)
  int32_t batch, seqlen, num_documents, window_size, num_sinks;
};

// eq. 7-9. All arrays from `scores` to `far_end` are contiguous.
struct AttentionFwdParams {
  DType dtype;                  // of q, k, v, q_far, k_far, out; scores, tau and lse are kF64 when it is kF64, else kF32
  const void* q;                // [batch, seqlen_q, num_heads, head_dim]
  const void* k;                // [batch, seqlen_k, num_kv_heads, head_dim]  logits of window rows (all rows without k_far)
  const void* v;                // [batch, seqlen_k, num_kv_heads, head_dim]
  const void* q_far;            // like q, or null: far rows use q, k. With q_far a row that is never in a window may hold
  const void* k_far;            //   anything (NaN too) in k, and one that is never far anything in k_far
  const void* scores;           // [batch, num_kv_heads, seqlen_k]  u; +inf: weight 1 (sinks)
  const void* tau;              // [batch, num_kv_heads, seqlen_q]
  const int32_t* window_begin;  // [batch, seqlen_q]  row index, <= num_carried + i, non-decreasing
  const int32_t* far_begin;     // [batch, num_kv_heads, seqlen_k]  query index, non-decreasing in the row
  const int32_t* far_end;       // [batch, num_kv_heads, seqlen_k]  <= far_begin: never far
  void* out;                    // [batch, seqlen_q, num_heads, head_dim]
  void* softmax_lse;            // [batch, num_heads, seqlen_q]  natural log
  Strides q_strides, k_strides, v_strides, q_far_strides, k_far_strides, out_strides;
  int32_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, head_dim;
  Gate gate;
  double softmax_scale;
};

// Section 5. Score rows: [ pool rows (num_pool_rows: carried scores without key or value) | the seqlen_k key rows ].
struct AttentionBwdParams {
  AttentionFwdParams fwd;     // with its outputs `out` and `softmax_lse` filled in
  const void* dout;           // [batch, seqlen_q, num_heads, head_dim]
  const void* dlse;           // [batch, num_heads, seqlen_q] gradient of softmax_lse, or null
  const int32_t* frac_begin;  // [batch, num_kv_heads, num_pool_rows + seqlen_k]  u fractional at queries [begin, end)
  const int32_t* frac_end;
  void *dq, *dk, *dv;         // contiguous, shaped like q, k, v, dtype of q; every element is written
  void *dq_far, *dk_far;      // likewise; null without q_far
  void* dscores;              // [batch, num_kv_heads, num_pool_rows + seqlen_k], dtype of scores (eq. 11)
  Strides dout_strides;
  int32_t num_pool_rows;
  bool deterministic;         // the same bits every time, whatever the number of threads
};

// eq. 1b. Rows as above; far rows are the sinks only. mass[r] = mass_in[r] + sum over the queries i in
// [own + ceil(w/2), own + w - 1] of this call (own = r - num_carried, r >= window_begin[i]) of
// sum over the group's heads exp(softmax_scale <q_i, k_r> - lse^W_i).
struct WindowMassParams {
  DType dtype;
  const void *q, *k, *q_far, *k_far;  // as in AttentionFwdParams
  const int32_t* window_begin;        // [batch, seqlen_q]
  const int32_t* far_begin;           // [batch, seqlen_k]  sinks only; every other row has far_end <= far_begin
  const int32_t* far_end;             // [batch, seqlen_k]
  const void* mass_in;                // [batch, num_kv_heads, seqlen_k] or null (zero); float32, float64 when dtype is kF64
  void* mass;                         // [batch, num_kv_heads, seqlen_k]
  Strides q_strides, k_strides, q_far_strides, k_far_strides;
  int32_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, head_dim, window_size;
  double softmax_scale;
};

// One token per batch row, the state changed in place (section 6).
// State rows of k and v per (batch row, KV head): [ num_sinks sinks | window_size ring rows, position p at
// p % window_size | topk slots ]. With far rotary k holds k_far throughout and ring_k the ring's rotated keys.
struct DecodeStepParams {
  DType dtype;
  const void *q, *q_far;         // [batch, num_heads, head_dim]; q_far null without far rotary
  const void *k, *k_far, *v;     // [batch, num_kv_heads, head_dim] of the new token
  // Either the score u of the key at position length - window_size, which now leaves the window (not read while that
  // position is < num_sinks) ...
  const void* candidate_scores;  // [batch, num_kv_heads], or null:
  // ... or the scores in the ring: the leaving key's is the candidate's, and the new token's takes its place.
  const void* scores;            // [batch, num_kv_heads] u of the new token
  void* ring_scores;             // [batch, num_kv_heads, window_size]
  void *state_k, *state_v;       // [batch, num_kv_heads, num_sinks + window_size + topk, head_dim]
  void* ring_k;                  // [batch, num_kv_heads, window_size, head_dim], null without far rotary
  void* slot_scores;             // [batch, num_kv_heads, topk]
  int64_t* slot_positions;       // [batch, num_kv_heads, topk]  -1: empty
  void* pool_scores;             // [batch, num_kv_heads, pool_size] descending, -inf unused
  void* ring_mass;               // [batch, num_kv_heads, window_size] or null: eq. 1b's running sums per ring row; reset
                                 //   for the new token, then increased by this query for the rows in the older half
  int64_t* lengths;              // [batch] tokens read before this one; increased by 1
  void* out;                     // [batch, num_heads, head_dim], contiguous
  void* softmax_lse;             // [batch, num_heads] or null
  int64_t q_stride_batch, q_stride_head, q_far_stride_batch, q_far_stride_head;
  int64_t k_stride_batch, k_stride_head, k_far_stride_batch, k_far_stride_head, v_stride_batch, v_stride_head;
  int32_t batch, num_heads, num_kv_heads, head_dim;
  int32_t topk, window_size, num_sinks, pool_size;
  Gate gate;
  double softmax_scale;
};

// eq. 1 along the sequence. stats: running count, mean and sum of squared deviations, in double.
struct NormaliseParams {
  DType dtype;             // of raw, scores, beta, gamma, slope
  const void* raw;         // [batch, seqlen, num_kv_heads]
  const void* beta;        // [num_kv_heads]
  const void* gamma;       // [num_kv_heads]
  const void* slope;       // [num_kv_heads]
  const double* stats_in;  // [batch, num_kv_heads, 3] count, mean, M2 before this call, or null (zeros)
  const int32_t* cu_seqlens;
  void* scores;            // [batch, seqlen, num_kv_heads]
  double* stats;           // [batch, num_kv_heads, 3] after this call
  Strides raw_strides, scores_strides;
  int32_t batch, seqlen, num_kv_heads, num_documents;
  bool timestep_norm;      // false: mean 0, divisor 1 (the count still runs: it is the position of the slope)
};

struct NormaliseBwdParams {
  NormaliseParams fwd;     // outputs unused
  const void* dscores;     // [batch, seqlen, num_kv_heads]
  const double* dstats;    // [batch, num_kv_heads, 3] gradient of stats (mean and M2; the count has none), or null
  void *draw, *dbeta, *dgamma, *dslope;  // draw contiguous [batch, seqlen, num_kv_heads]
  double* dstats_in;       // [batch, num_kv_heads, 3] or null
  Strides dscores_strides;
};

// eq. 2 on the last dimension of a contiguous [rows, columns] matrix.
struct SparsekParams {
  DType dtype;
  const void* z;     // [rows, columns]
  void* p;           // [rows, columns] clamp(z - tau, 0, 1)
  void* tau;         // [rows], -inf when columns <= k
  int64_t rows, columns, k;
};

}  // namespace sparsek
