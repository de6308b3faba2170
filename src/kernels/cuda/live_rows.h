// Lists of far rows, one per (KV head, chunk of queries): what attention's tiles gather from (kernels/params.h "Rows").
#pragma once
#include <cstdint>

namespace sparsek::cuda {

// A far row that some query of a chunk sees; u as in AttentionFwdParams::scores. Visible at queries [begin, end), where
// what lies outside the chunk may be cut off.
struct LiveRow {
  int32_t row, begin, end;
  float u;
};

// A list holds first the rows that every query of the chunk sees at weight 1, then those all see at weights inside
// (0, 1), then the others.
struct LiveLists {
  LiveRow* rows;     // [batch * num_kv_heads, num_chunks, capacity]
  int32_t* count;    // [batch * num_kv_heads, num_chunks]
  int32_t* classes;  // [batch * num_kv_heads, num_chunks, 2] where the first and the second kind end
  int32_t capacity;  // at least topk + num_sinks + chunk, or seqlen_k where that is less
  int32_t max_far;   // the most far rows that one query sees: topk + num_sinks, not cut off at seqlen_k. What a caller
                     // promises: rows that break it give NaN, never less attention (attention.h, rows/live_lists.h)
};

}  // namespace sparsek::cuda
