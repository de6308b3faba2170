// The schemas of torch.ops.sparsek. Each operation's kernels are registered beside it, in the file of its name.
// Operations whose name starts with _ are the steps the public ones are made of; their layouts are kernels/params.h's.
#include <torch/library.h>

#include "ops/ops.h"

bool sparsek::ops::has_kernels(at::DeviceType device) {
  const auto operation = c10::Dispatcher::singleton().findOp({"sparsek::decode_step", ""});
  return operation &&
         operation->hasKernelForDispatchKey(c10::computeDispatchKey(std::nullopt, std::nullopt, at::Device(device)));
}

TORCH_LIBRARY(sparsek, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // eq. 1, 1b, 2
  m.def(
      "normalise_scores(Tensor raw, Tensor beta, Tensor gamma, Tensor slope, *, Tensor? stats=None, "
      "Tensor? cu_seqlens=None, bool timestep_norm=True) -> (Tensor scores, Tensor new_stats)",
      tags);
  m.def(
      "normalise_scores_backward(Tensor? dscores, Tensor? dstats, Tensor raw, Tensor beta, Tensor gamma, Tensor slope, "
      "*, "
      "Tensor? stats=None, Tensor? cu_seqlens=None, bool timestep_norm=True) -> "
      "(Tensor draw, Tensor dbeta, Tensor dgamma, Tensor dslope, Tensor dstats_in)",
      tags);
  m.def(
      "window_mass(Tensor q, Tensor k, *, int window_size, int num_sinks=0, float? softmax_scale=None, "
      "Tensor? q_far=None, Tensor? k_far=None, Tensor? cu_seqlens=None) -> Tensor",
      tags);
  m.def(
      "window_mass_chunk(Tensor q, Tensor k, Tensor state_k, Tensor? ring_k, Tensor ring_mass, Tensor lengths, *, "
      "int window_size, int num_sinks=0, float? softmax_scale=None, Tensor? q_far=None, Tensor? k_far=None) -> "
      "(Tensor y, Tensor new_ring_mass)",
      tags);
  m.def("sparsek(Tensor z, int k) -> Tensor", tags);
  m.def("sparsek_backward(Tensor dp, Tensor p) -> Tensor", tags);

  // eq. 3-9
  m.def(
      "select(Tensor scores, *, int topk, int window_size, int num_sinks=0, int? pool_size=None, "
      "Tensor? cu_seqlens=None) -> (Tensor tau, Tensor expiry, Tensor frac_begin, Tensor frac_end)",
      tags);
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor scores, *, int topk, int window_size, int num_sinks=0, "
      "int? pool_size=None, str gate=\"soft\", float? softmax_scale=None, Tensor? q_far=None, Tensor? k_far=None, "
      "Tensor? cu_seqlens=None, bool deterministic=False) -> (Tensor out, Tensor softmax_lse)",
      tags);
  // select and _visibility in one, and with far_lists_group the lists of far rows that a GPU's tiles read
  // (ops/far_lists.h).
  m.def(
      "_select_rows(Tensor scores, *, int topk, int window_size, int num_sinks=0, int? pool_size=None, "
      "Tensor? cu_seqlens=None, int far_lists_group=0) -> (Tensor row_scores, Tensor row_tau, Tensor window_begin, "
      "Tensor far_begin, Tensor far_end, Tensor row_frac_begin, Tensor row_frac_end, Tensor far_lists)",
      tags);
  m.def("_checked_cu_seqlens(Tensor cu_seqlens, SymInt seqlen) -> Tensor", tags);
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor tau, Tensor expiry, Tensor frac_begin, "
      "Tensor frac_end, *, int window_size, int num_sinks=0, str gate=\"soft\", float? softmax_scale=None, "
      "Tensor? q_far=None, Tensor? k_far=None, Tensor? cu_seqlens=None, bool deterministic=False, "
      "int? topk=None) -> (Tensor out, Tensor softmax_lse)",
      tags);
  m.def(
      "_visibility(Tensor scores, Tensor tau, Tensor expiry, Tensor frac_begin, Tensor frac_end, *, int window_size, "
      "int num_sinks, Tensor? cu_seqlens=None) -> (Tensor row_scores, Tensor row_tau, Tensor window_begin, "
      "Tensor far_begin, Tensor far_end, Tensor row_frac_begin, Tensor row_frac_end)",
      tags);
  // max_far: the most far rows that a query sees; far_lists: what _select_rows made for these rows.
  m.def(
      "_attention_rows(Tensor q, Tensor k, Tensor v, Tensor? q_far, Tensor? k_far, Tensor row_scores, Tensor tau, "
      "Tensor window_begin, Tensor far_begin, Tensor far_end, Tensor frac_begin, Tensor frac_end, *, str gate, "
      "float softmax_scale, bool deterministic, int? max_far=None, Tensor? far_lists=None) -> "
      "(Tensor out, Tensor softmax_lse)",
      tags);
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? q_far, Tensor? k_far, "
      "Tensor row_scores, Tensor tau, Tensor window_begin, Tensor far_begin, Tensor far_end, Tensor frac_begin, "
      "Tensor frac_end, Tensor out, Tensor softmax_lse, *, str gate, float softmax_scale, bool deterministic, "
      "int? max_far=None, Tensor? far_lists=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_far, Tensor dk_far, "
      "Tensor dscores)",
      tags);

  // Section 6
  m.def(
      "new_state(*, int batch, int num_kv_heads, int head_dim, int topk, int window_size, int num_sinks=0, "
      "int? pool_size=None, bool far_rotary=False, bool delayed_scores=False, ScalarType? dtype=None, "
      "Device? device=None) -> (Tensor k, Tensor v, Tensor ring_k, Tensor ring_scores, Tensor ring_mass, "
      "Tensor slot_scores, Tensor slot_positions, Tensor pool_scores, Tensor stats, Tensor lengths)",
      tags);
  m.def("leaving_mass(Tensor ring_mass, Tensor lengths, *, int window_size) -> Tensor", tags);
  m.def(
      "attention_chunk(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor state_k, Tensor state_v, Tensor? ring_k, "
      "Tensor ring_scores, Tensor slot_scores, Tensor slot_positions, Tensor pool_scores, Tensor lengths, *, int topk, "
      "int window_size, int num_sinks=0, int? pool_size=None, str gate=\"soft\", float? softmax_scale=None, "
      "Tensor? q_far=None, Tensor? k_far=None, bool delayed_scores=False, bool deterministic=False) -> "
      "(Tensor out, Tensor softmax_lse, Tensor new_k, Tensor new_v, Tensor new_ring_k, Tensor new_ring_scores, "
      "Tensor new_slot_scores, Tensor new_slot_positions, Tensor new_pool_scores, Tensor new_lengths)",
      tags);
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor scores, Tensor(a!) state_k, Tensor(b!) state_v, "
      "Tensor(c!)? ring_k, Tensor(d!) ring_scores, Tensor(e!)? ring_mass, Tensor(f!) slot_scores, "
      "Tensor(g!) slot_positions, Tensor(h!) pool_scores, Tensor(i!) lengths, *, int topk, int window_size, "
      "int num_sinks=0, int? pool_size=None, str gate=\"soft\", float? softmax_scale=None, Tensor? q_far=None, "
      "Tensor? k_far=None, bool delayed_scores=False) -> Tensor",
      tags);
  m.def(
      "_select_chunk(Tensor candidate_scores, Tensor slot_scores, Tensor slot_positions, Tensor pool_scores, "
      "Tensor lengths, *, int topk, int window_size, int num_sinks, int pool_size) -> (Tensor tau, Tensor slot_expiry, "
      "Tensor slot_frac_begin, Tensor slot_frac_end, Tensor pool_frac_begin, Tensor pool_frac_end, "
      "Tensor arrival_expiry, Tensor arrival_frac_begin, Tensor arrival_frac_end, Tensor new_slot_source, "
      "Tensor new_slot_positions, Tensor new_pool_source)",
      tags);
  m.def(
      "_chunk_visibility(Tensor lengths, Tensor slot_expiry, Tensor slot_frac_begin, Tensor slot_frac_end, "
      "Tensor pool_frac_begin, Tensor pool_frac_end, Tensor arrival_expiry, Tensor arrival_frac_begin, "
      "Tensor arrival_frac_end, Tensor new_slot_source, *, int window_size, int num_sinks) -> (Tensor window_begin, "
      "Tensor far_begin, Tensor far_end, Tensor frac_begin, Tensor frac_end, Tensor is_sink, Tensor carried_source, "
      "Tensor state_source)",
      tags);
  m.def(
      "_window_rows(Tensor q, Tensor? lengths, Tensor? cu_seqlens, *, int window_size, int num_sinks) -> "
      "(Tensor window_begin, Tensor far_begin, Tensor far_end, Tensor num_queries)",
      tags);
  m.def(
      "_window_mass_rows(Tensor q, Tensor k, Tensor? q_far, Tensor? k_far, Tensor window_begin, Tensor far_begin, "
      "Tensor far_end, Tensor? mass_in, *, int window_size, float softmax_scale) -> Tensor",
      tags);

  // Between attention layers (layer_ops.h). rstd is the gradient's, empty where torch differentiates by itself.
  m.def(
      "_add_rms_norm(Tensor x, Tensor? update, Tensor weight, *, float eps, ScalarType dtype) -> "
      "(Tensor out, Tensor sum, Tensor rstd)",
      tags);
  m.def(
      "_add_rms_norm_backward(Tensor dout, Tensor? dsum, Tensor sum, Tensor rstd, Tensor weight, *, bool has_update, "
      "bool weight_gradient) -> (Tensor dx, Tensor dupdate, Tensor dweight)",
      tags);
  m.def(
      "_split_rotary(Tensor qkv, Tensor cos, Tensor sin, Tensor? far_cos, Tensor? far_sin, *, int num_heads, "
      "int num_kv_heads) -> (Tensor q, Tensor k, Tensor v, Tensor q_far, Tensor k_far)",
      tags);
  m.def(
      "_split_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? dq_far, Tensor? dk_far, Tensor cos, Tensor sin, "
      "Tensor? far_cos, Tensor? far_sin) -> Tensor",
      tags);
  m.def("_swiglu(Tensor gate_up) -> Tensor", tags);
  m.def("_swiglu_backward(Tensor dout, Tensor gate_up) -> Tensor", tags);
  m.def(
      "_cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor? teacher, *, int ignored, float next_token_weight, "
      "float kl_weight, bool writes_gradient) -> (Tensor losses, Tensor divergences)",
      tags);
}
