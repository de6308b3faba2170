// Whole sequences through the CPU kernels: select, visibility, attention forward and backward.
#pragma once
#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/select/select.h"
#include "kernels/cpu/select/visibility.h"
#include "tests/kernels/properties/problem.h"

namespace sparsek::test {

enum class Backward { kNone, kFast, kDeterministic };

// dq .. dscores of one attention call, poisoned before and checked after.
template <class Element>
struct GradientBuffers {
  Poisoned<Element> dq, dk, dv, dq_far, dk_far;
  Poisoned<ScoreOf<Element>> dscores;

  GradientBuffers(int64_t q_size, int64_t kv_size, bool far_rotary, int64_t scores_size)
      : dq(q_size),
        dk(kv_size),
        dv(kv_size),
        dq_far(far_rotary ? q_size : 0),
        dk_far(far_rotary ? kv_size : 0),
        dscores(scores_size) {}

  void put(AttentionBwdParams& params, bool far_rotary) {
    params.dq = dq.data();
    params.dk = dk.data();
    params.dv = dv.data();
    params.dq_far = far_rotary ? dq_far.data() : nullptr;
    params.dk_far = far_rotary ? dk_far.data() : nullptr;
    params.dscores = dscores.data();
  }
  void check() const {
    for (const Poisoned<Element>* buffer : {&dq, &dk, &dv, &dq_far, &dk_far}) {
      EXPECT_GUARDS_INTACT(*buffer);
      EXPECT_FULLY_WRITTEN(*buffer);
    }
    EXPECT_GUARDS_INTACT(dscores);
    EXPECT_FULLY_WRITTEN(dscores);
  }
};

template <class Element>
Run run_whole(const Problem& problem, Backward backward = Backward::kNone) {
  using Score = ScoreOf<Element>;
  const Spec& spec = problem.spec;
  const Storage<Element> in(problem);
  const bool far_rotary = !in.q_far.empty();
  const int64_t tokens = spec.batch * spec.seqlen, per_head = tokens * spec.num_kv_heads;
  const Strides score_strides{spec.seqlen * spec.num_kv_heads, spec.num_kv_heads, 1};
  const std::vector<int32_t> cu_seqlens(spec.cu_seqlens.begin(), spec.cu_seqlens.end());

  Poisoned<Score> tau(per_head);
  Poisoned<int32_t> expiry(per_head), frac_begin(per_head), frac_end(per_head);
  SelectParams select{};
  select.dtype = std::is_same_v<Element, double> ? DType::kF64 : DType::kF32;
  select.scores = in.scores.data();
  select.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
  select.tau = tau.data();
  select.expiry = expiry.data();
  select.frac_begin = frac_begin.data();
  select.frac_end = frac_end.data();
  select.scores_strides = select.out_strides = score_strides;
  select.batch = static_cast<int32_t>(spec.batch);
  select.seqlen = static_cast<int32_t>(spec.seqlen);
  select.num_kv_heads = static_cast<int32_t>(spec.num_kv_heads);
  select.num_documents = cu_seqlens.empty() ? 1 : static_cast<int32_t>(cu_seqlens.size()) - 1;
  select.topk = static_cast<int32_t>(spec.topk);
  select.window_size = static_cast<int32_t>(spec.window_size);
  select.num_sinks = static_cast<int32_t>(spec.num_sinks);
  select.pool_size = static_cast<int32_t>(spec.pool_size);
  cpu::select(select);

  Poisoned<Score> row_scores(per_head), row_tau(per_head);
  Poisoned<int32_t> window_begin(tokens), far_begin(per_head), far_end(per_head), row_frac_begin(per_head),
      row_frac_end(per_head);
  VisibilityParams rows{};
  rows.dtype = select.dtype;
  rows.scores = in.scores.data();
  rows.tau = tau.data();
  rows.expiry = expiry.data();
  rows.frac_begin = frac_begin.data();
  rows.frac_end = frac_end.data();
  rows.cu_seqlens = select.cu_seqlens;
  rows.scores_strides = rows.tau_strides = rows.index_strides = score_strides;
  rows.row_scores = row_scores.data();
  rows.row_tau = row_tau.data();
  rows.window_begin = window_begin.data();
  rows.far_begin = far_begin.data();
  rows.far_end = far_end.data();
  rows.row_frac_begin = row_frac_begin.data();
  rows.row_frac_end = row_frac_end.data();
  rows.batch = select.batch;
  rows.seqlen = select.seqlen;
  rows.num_kv_heads = select.num_kv_heads;
  rows.num_documents = select.num_documents;
  rows.window_size = select.window_size;
  rows.num_sinks = select.num_sinks;
  cpu::visibility(rows);

  Poisoned<Element> out(tokens * problem.q_row());
  Poisoned<Score> lse(tokens * spec.num_heads);
  AttentionBwdParams params{};
  AttentionFwdParams& fwd = params.fwd;
  fwd = common_params<Element>(spec);
  fwd.q = in.q.data();
  fwd.k = in.k.data();
  fwd.v = in.v.data();
  fwd.q_far = far_rotary ? in.q_far.data() : nullptr;
  fwd.k_far = far_rotary ? in.k_far.data() : nullptr;
  fwd.scores = row_scores.data();
  fwd.tau = row_tau.data();
  fwd.window_begin = window_begin.data();
  fwd.far_begin = far_begin.data();
  fwd.far_end = far_end.data();
  fwd.out = out.data();
  fwd.softmax_lse = lse.data();
  fwd.q_strides = fwd.q_far_strides = fwd.out_strides = contiguous(spec.seqlen, spec.num_heads, spec.head_dim);
  fwd.k_strides = fwd.v_strides = fwd.k_far_strides = contiguous(spec.seqlen, spec.num_kv_heads, spec.head_dim);
  fwd.seqlen_q = fwd.seqlen_k = select.seqlen;
  fwd.num_carried = 0;
  cpu::attention_forward(fwd);

  EXPECT_GUARDS_INTACT(tau);
  for (const Poisoned<int32_t>* buffer :
       {&expiry, &frac_begin, &frac_end, &window_begin, &far_begin, &far_end, &row_frac_begin, &row_frac_end}) {
    EXPECT_GUARDS_INTACT(*buffer);
    EXPECT_FULLY_WRITTEN(*buffer);
  }
  EXPECT_GUARDS_INTACT(out);
  EXPECT_FULLY_WRITTEN(out);
  EXPECT_GUARDS_INTACT(lse);
  Run run;
  run.out = as_doubles(out);
  run.softmax_lse = as_doubles(lse);
  run.tau = as_doubles(tau);
  if (backward == Backward::kNone) return run;

  GradientBuffers<Element> grad(tokens * problem.q_row(), tokens * problem.kv_row(), far_rotary, per_head);
  grad.put(params, far_rotary);
  params.dout = in.dout.data();
  params.dlse = in.dlse.data();
  params.frac_begin = row_frac_begin.data();
  params.frac_end = row_frac_end.data();
  params.dout_strides = fwd.q_strides;
  params.num_pool_rows = 0;
  params.deterministic = backward == Backward::kDeterministic;
  cpu::attention_backward(params);
  grad.check();
  run.grad = {as_doubles(grad.dq),     as_doubles(grad.dk),    as_doubles(grad.dv), {},
              as_doubles(grad.dq_far), as_doubles(grad.dk_far)};
  run.grad.dscores.resize(per_head);
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t t = 0; t < spec.seqlen; ++t) {
      for (int64_t h = 0; h < spec.num_kv_heads; ++h) {
        run.grad.dscores[(b * spec.seqlen + t) * spec.num_kv_heads + h] =
            static_cast<double>(grad.dscores[(b * spec.num_kv_heads + h) * spec.seqlen + t]);
      }
    }
  }
  return run;
}

}  // namespace sparsek::test
