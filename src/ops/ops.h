// The operations as C++ functions on tensors. Each goes through torch's dispatcher (schemas: ops/schema.cc), so
// autograd, autocast, meta tensors and CUDA (ops/cuda) apply. Layouts: q, out [batch, seqlen, num_heads, head_dim]; k,
// v [batch, seqlen, num_kv_heads, head_dim]; scores [batch, seqlen, num_kv_heads]; softmax_lse [batch, num_heads,
// seqlen].
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace sparsek::ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

int64_t default_pool_size(int64_t topk);  // max(4 * topk, 1024)

// Whether the operations have kernels for a device: the CPU's are always here, CUDA's where they were built and loaded.
bool has_kernels(at::DeviceType device);

// eq. 1 -> (scores, stats [batch, num_kv_heads, 3] float64: count, mean, sum of squared deviations).
std::tuple<Tensor, Tensor> normalise_scores(const Tensor& raw, const Tensor& beta, const Tensor& gamma,
                                            const Tensor& slope, const MaybeTensor& stats = {},
                                            const MaybeTensor& cu_seqlens = {}, bool timestep_norm = true);

// eq. 1b -> y [batch, seqlen, num_kv_heads], for whole sequences. No gradient.
Tensor window_mass(const Tensor& q, const Tensor& k, int64_t window_size, int64_t num_sinks = 0,
                   std::optional<double> softmax_scale = {}, const MaybeTensor& q_far = {},
                   const MaybeTensor& k_far = {}, const MaybeTensor& cu_seqlens = {});

// eq. 3-6 -> (tau, expiry, frac_begin, frac_end), each [batch, seqlen, num_kv_heads].
std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& scores, int64_t topk, int64_t window_size,
                                                  int64_t num_sinks = 0, std::optional<int64_t> pool_size = {},
                                                  const MaybeTensor& cu_seqlens = {});

// eq. 7-9 -> (out, softmax_lse).
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores,
                                     int64_t topk, int64_t window_size, int64_t num_sinks = 0,
                                     std::optional<int64_t> pool_size = {}, std::string_view gate = "soft",
                                     std::optional<double> softmax_scale = {}, const MaybeTensor& q_far = {},
                                     const MaybeTensor& k_far = {}, const MaybeTensor& cu_seqlens = {},
                                     bool deterministic = false);

// What attention carries from chunk to chunk and token to token (section 6), one layer. Rows of k and v per batch row
// and KV head: num_sinks sinks | window_size ring rows (position p at p % window_size) | topk slots.
struct AttentionState {
  Tensor k, v;    // [batch, num_kv_heads, num_sinks + window_size + topk, head_dim]; with far rotary k is k_far
  Tensor ring_k;  // [batch, num_kv_heads, window_size, head_dim] rotated keys of the ring; undefined without far rotary
  Tensor ring_scores;  // [batch, num_kv_heads, window_size] float32: u of ring keys, or whatever per-key number the
                       //   caller needs once the key leaves the window (the scorer's raw output, with delayed scores)
  Tensor ring_mass;    // [batch, num_kv_heads, window_size] float32: eq. 1b's running sums; undefined when not wanted
  Tensor slot_scores;  // [batch, num_kv_heads, topk] float32
  Tensor slot_positions;  // [batch, num_kv_heads, topk] int64, -1 empty
  Tensor pool_scores;     // [batch, num_kv_heads, pool_size] float32, descending, -inf unused
  Tensor stats;           // [batch, num_kv_heads, 3] float64, normalise_scores
  Tensor lengths;         // [batch] int64 tokens read
};

struct AttentionStateOptions {
  int64_t batch = 1, num_kv_heads, head_dim, topk, window_size, num_sinks = 0;
  std::optional<int64_t> pool_size = {};
  bool far_rotary = false, delayed_scores = false;
  at::ScalarType dtype = at::kBFloat16;
  at::Device device = at::kCPU;
};
AttentionState new_attention_state(const AttentionStateOptions& options);
int64_t size_in_bytes(const AttentionState& state);
// The batch rows of several states behind each other, copied: states made with the same options but for batch, at least
// one.
AttentionState join(const std::vector<AttentionState>& states);

// eq. 12-13: the chunk's (out, softmax_lse, new state). Functional and differentiable in q, k, v, scores and the state.
// delayed_scores false: scores[t] belongs to the chunk's own token t (state.ring_scores carries those still in the
// window). delayed_scores true: scores[t] is the final u of the key that becomes a candidate at query t (position
// length + t - window_size; ignored where that is < num_sinks), and state.ring_scores is passed through untouched.
struct AttentionOptions {
  int64_t topk, window_size, num_sinks = 0;
  std::optional<int64_t> pool_size = {};
  std::string_view gate = "soft";
  std::optional<double> softmax_scale = {};
  bool delayed_scores = false;
};
std::tuple<Tensor, Tensor, AttentionState> attention_chunk(const Tensor& q, const Tensor& k, const Tensor& v,
                                                           const Tensor& scores, const AttentionState& state,
                                                           const AttentionOptions& options,
                                                           const MaybeTensor& q_far = {},
                                                           const MaybeTensor& k_far = {});

// eq. 1b behind a state: (y [batch, chunk, num_kv_heads] of the keys that become candidates at the chunk's queries,
// final; new ring_mass). Call before attention_chunk, with the same state.
std::tuple<Tensor, Tensor> window_mass_chunk(const Tensor& q, const Tensor& k, const AttentionState& state,
                                             const AttentionOptions& options, const MaybeTensor& q_far = {},
                                             const MaybeTensor& k_far = {});

// One token per batch row, in place: q [batch, 1, num_heads, head_dim], k, v [batch, 1, num_kv_heads, head_dim], scores
// [batch, 1, num_kv_heads] (meaning as in attention_chunk). Updates ring_mass when the state has one. Needs pool_size >
// topk.
Tensor decode_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& scores, AttentionState& state,
                   const AttentionOptions& options, const MaybeTensor& q_far = {}, const MaybeTensor& k_far = {});
// y [batch, 1, num_kv_heads] of the key that the next decode_step makes a candidate, from ring_mass and lengths.
Tensor leaving_mass(const AttentionState& state, const AttentionOptions& options);

}  // namespace sparsek::ops
