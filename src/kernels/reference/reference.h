// The definition of every operation of docs/math.md: whole sequences, double precision, plain loops over the sets that
// the equations name. Tests compare the kernels with it. It shares no code with them, knows nothing of rows, chunks or
// carried state (eq. 12 says that those give the same result), and makes no attempt to be fast: memory is linear, time
// is O(T * (pool + visible * head_dim)), and O(T^2) for the expiries and the score normalisation.
//
// Every tensor is a flat std::vector<double>, last dimension fastest:
//   q, out, dq          [batch, seqlen, num_heads, head_dim]
//   k, v, dk, dv        [batch, seqlen, num_kv_heads, head_dim]
//   scores, tau, expiry [batch, seqlen, num_kv_heads]
//   softmax_lse, dlse   [batch, num_heads, seqlen]
// Query head h reads KV head h / (num_heads / num_kv_heads).
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/params.h"

namespace sparsek::reference {

using Values = std::vector<double>;
using Indices = std::vector<int64_t>;

// math.md section 2, "Precision": what tau and u - tau are rounded to. kFloat32 expects scores that are float32 values.
enum class Precision { kFloat32, kFloat64 };

struct Spec {
  int64_t batch = 1, seqlen = 0;
  int64_t num_heads = 1, num_kv_heads = 1, head_dim = 8;
  int64_t topk = 1, window_size = 1, num_sinks = 0;
  int64_t pool_size = 0;    // 0: no limit
  Indices cu_seqlens = {};  // document starts, first 0, last seqlen; empty: one document. batch 1 only
  Gate gate = Gate::kSoft;
  double softmax_scale = 1.0;
  Precision precision = Precision::kFloat32;
};

// eq. 2 on one vector: p = clamp(z - tau, 0, 1); tau -inf and p 1 where z has at most k elements.
struct Projection {
  Values p;
  double tau;
};
Projection sparsek_operator(const Values& z, int64_t k, Precision precision);
// The gradient of eq. 2: dz from dp.
Values sparsek_operator_backward(const Values& z, int64_t k, Precision precision, const Values& dp);

// eq. 4-6 at one query.
struct QuerySelection {
  int64_t query;  // absolute
  int64_t document_begin;
  double tau;
  Indices pool;          // M_i, best rank first
  Values weights;        // p_ij of each of them
  int64_t num_selected;  // A_i is the first num_selected of the pool
  bool is_fractional(int64_t rank) const { return weights[rank] > 0 && weights[rank] < 1; }  // F_i
};
// Calls `visit` for the queries in order. u: [seqlen], the scores of one KV head.
void for_each_query(const Values& u, const Spec& spec, const std::function<void(const QuerySelection&)>& visit);

// eq. 3-6 at every query, and the intervals of facts b and c, found by looking at every set A_i and F_i.
struct Selection {
  Values tau;                            // [batch, seqlen, num_kv_heads]
  Indices expiry, frac_begin, frac_end;  // [batch, seqlen, num_kv_heads]  absolute query indices
};
Selection select(const Values& scores, const Spec& spec);

struct AttentionInputs {
  Values q, k, v, scores;
  Values q_far = {}, k_far = {};  // eq. 9, shaped like q and k; empty without far rotary
};
struct AttentionOutputs {
  Values out, softmax_lse;
};
// eq. 7-9.
AttentionOutputs attention_forward(const AttentionInputs& inputs, const Spec& spec);

struct AttentionGradients {
  Values dq, dk, dv, dscores;
  Values dq_far, dk_far;  // empty without far rotary
};
// Section 5. dlse: the gradient of softmax_lse, or empty.
AttentionGradients attention_backward(const AttentionInputs& inputs, const Values& dout, const Values& dlse,
                                      const Spec& spec);

// eq. 1 on raw [batch, seqlen, num_kv_heads]; beta, gamma and slope are [num_kv_heads]. Uses batch, seqlen,
// num_kv_heads and cu_seqlens of `spec`. The result is not rounded.
struct NormaliseOptions {
  Values beta, gamma, slope;
  bool timestep_norm = true;  // false: mean 0 and divisor 1
};
Values normalise_scores(const Values& raw, const NormaliseOptions& options, const Spec& spec);

struct NormaliseGradients {
  Values draw, dbeta, dgamma, dslope;
};
NormaliseGradients normalise_scores_backward(const Values& raw, const Values& dscores, const NormaliseOptions& options,
                                             const Spec& spec);

// eq. 1b; scores of `inputs` and v are not read. A key whose window reaches past its document's end takes the mean over
// the queries that exist (it never becomes a candidate); without any (always when window_size is 1) the mean is 0.
struct WindowMass {
  Values mass;  // [batch, seqlen, num_kv_heads] the sum over those queries and the group's heads
  Values y;     // [batch, seqlen, num_kv_heads] log(1e-9 + mean)
};
WindowMass window_mass(const AttentionInputs& inputs, const Spec& spec);

// [begin, end) of every document of one batch row.
struct Document {
  int64_t begin, end;
};
std::vector<Document> documents(const Spec& spec);

}  // namespace sparsek::reference
