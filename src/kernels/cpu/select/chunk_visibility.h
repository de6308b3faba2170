// From a chunk's selection to the row arrays that attention reads, and where every row of the state comes from and goes
// to (kernels/params.h "Rows"; sections 3 and 6 of docs/math.md).
//
// Rows of a chunk: [ topk slots | num_sinks sinks | window_size ring rows in position order | chunk ]. Ring row r holds
// position length - window_size + r (negative: empty), so the key that becomes a candidate at query t, "arrival" t,
// is row topk + num_sinks + t, in the ring or in the chunk alike.
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

// The selection's arrays are SelectChunkParams' outputs. All arrays are contiguous.
// num_rows = topk + num_sinks + window_size + chunk; num_state_rows = num_sinks + window_size + topk.
struct ChunkVisibilityParams {
  const int64_t* lengths;                                                 // [batch] tokens read before the chunk
  const int32_t *slot_expiry, *slot_frac_begin, *slot_frac_end;           // [batch, num_kv_heads, topk]
  const int32_t *pool_frac_begin, *pool_frac_end;                         // [batch, num_kv_heads, pool_capacity]
  const int32_t *arrival_expiry, *arrival_frac_begin, *arrival_frac_end;  // [batch, num_kv_heads, chunk]
  const int32_t* new_slot_source;                                         // [batch, num_kv_heads, topk]
  int32_t* window_begin;                                                  // [batch, chunk]
  int32_t *far_begin, *far_end;                                           // [batch, num_kv_heads, num_rows]
  int32_t *frac_begin, *frac_end;  // [batch, num_kv_heads, pool_capacity + num_rows]
  bool* is_sink;                   // [batch, num_rows] rows that are read as sinks, wherever they lie
  int64_t* carried_source;         // [batch, topk + num_sinks + window_size, num_kv_heads] carried row -> row of the
                                   //   state [batch * num_kv_heads * num_state_rows]
  int64_t* state_source;           // [batch, num_kv_heads, num_state_rows] row of the new state -> row of
                                   //   [batch * num_rows * num_kv_heads]; empty slots name any row
  int32_t batch, chunk, num_kv_heads, topk, window_size, num_sinks, pool_capacity;
};
void chunk_visibility(const ChunkVisibilityParams& params);

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
void window_rows(const WindowRowsParams& params);

}  // namespace sparsek::cpu
