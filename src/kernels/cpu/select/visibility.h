// From a selection to the row arrays that attention reads (kernels/params.h, "Rows").
#pragma once
#include "kernels/params.h"

namespace sparsek::cpu {

// Whole sequences: scores, tau and the int32 arrays of `select` are [batch, seqlen, num_kv_heads] with strides; the
// outputs are contiguous and head-major as AttentionFwdParams / AttentionBwdParams want them. Sinks get the score +inf
// and are far rows from j + w to their document's end; expiry is clipped to it, and fractions to [0, seqlen]. Any
// output may be null.
struct VisibilityParams {
  DType dtype;  // of scores and tau
  const void *scores, *tau;
  const int32_t *expiry, *frac_begin, *frac_end, *cu_seqlens;
  Strides scores_strides, tau_strides, index_strides;  // (batch, seq, head)
  void* row_scores;                                    // [batch, num_kv_heads, seqlen]
  void* row_tau;                                       // [batch, num_kv_heads, seqlen]
  int32_t* window_begin;                               // [batch, seqlen]
  int32_t *far_begin, *far_end;                        // [batch, num_kv_heads, seqlen]
  int32_t *row_frac_begin, *row_frac_end;              // [batch, num_kv_heads, seqlen]
  int32_t batch, seqlen, num_kv_heads, num_documents, window_size, num_sinks;
};
void visibility(const VisibilityParams& params);

}  // namespace sparsek::cpu
