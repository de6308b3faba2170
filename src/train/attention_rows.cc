// The baselines on the row model (kernels/params.h, "Rows") with every visible key's weight 1: window attention with
// sinks, and dense attention behind a cache of a fixed number of tokens, as Transformer-XL has it.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "train/attention.h"

namespace sparsek::train {
namespace {

struct Rows {
  at::Tensor k, v, k_far;         // [batch, rows, num_kv_heads, head_dim], the chunk's own last
  at::Tensor window_begin;        // int32 [batch, seqlen]
  at::Tensor far_begin, far_end;  // int32 [batch, rows]
};

// max_far: the most far rows that a query sees.
at::Tensor row_attention(const AttentionInputs& in, const Rows& rows, int64_t max_far) {
  const int64_t batch = in.q.size(0), heads = in.k.size(2), count = rows.k.size(1);
  const auto scores = in.q.options().dtype(ops::scores_dtype(in.q.scalar_type()));
  const auto indices = rows.window_begin.options();
  const auto of_every_head = [&](const at::Tensor& index) {
    return index.unsqueeze(1).expand({batch, heads, count}).contiguous();
  };
  const auto maybe = [](const at::Tensor& x) { return x.defined() ? ops::MaybeTensor(x) : std::nullopt; };
  const at::Tensor nowhere = at::zeros({batch, heads, count}, indices);
  return std::get<0>(ops::call_attention_rows(
      in.q, rows.k, rows.v, maybe(in.q_far), maybe(rows.k_far), at::zeros({batch, heads, count}, scores),
      at::full({batch, heads, in.q.size(1)}, -std::numeric_limits<double>::infinity(), scores), rows.window_begin,
      of_every_head(rows.far_begin), of_every_head(rows.far_end), nowhere, nowhere, "hard",
      ops::scale_or_default({}, in.q), at::globalContext().deterministicAlgorithms(), max_far, {}));
}

// The rows of `carried` [batch, num_sinks + window_size, ...] and of the chunk, `all`, that the next chunk needs.
at::Tensor next_window(const at::Tensor& all, const at::Tensor& lengths, int64_t num_sinks, int64_t window_size,
                       int64_t seqlen) {
  const at::Tensor window = all.narrow(1, all.size(1) - window_size, window_size);
  if (num_sinks == 0) return window;
  // Sink j was there before, or is the chunk's token j - length, or is not there yet.
  const at::Tensor sink = at::arange(num_sinks, lengths.options()).unsqueeze(0);
  const at::Tensor own = sink - lengths.unsqueeze(1);
  const at::Tensor source = at::where(own.ge(0).logical_and_(own.lt(seqlen)), own + num_sinks + window_size, sink);
  const at::Tensor index = source.unsqueeze(2).unsqueeze(3).expand({-1, -1, all.size(2), all.size(3)});
  return at::cat({all.gather(1, index), window}, 1);
}

std::pair<at::Tensor, LayerState> window_chunk(const AttentionSettings& settings, const AttentionInputs& in,
                                               const LayerState& state) {
  const int64_t window_size = settings.attention.window_size, num_sinks = settings.attention.num_sinks;
  const int64_t seqlen = in.q.size(1);
  Rows rows;
  std::tie(rows.window_begin, rows.far_begin, rows.far_end, std::ignore) =
      ops::call_window_rows(in.q, state.lengths, {}, window_size, num_sinks);
  LayerState next;
  rows.v = at::cat({state.v, in.v}, 1);
  if (in.k_far.defined()) {  // sinks are never in a window: their rows of k are not read
    rows.k_far = at::cat({state.k, in.k_far}, 1);
    const at::Tensor rotated = at::cat({state.ring_k, in.k}, 1);
    rows.k = at::cat({state.k.narrow(1, 0, num_sinks).detach(), rotated}, 1);
    next.ring_k = rotated.narrow(1, seqlen, window_size);
  } else {
    rows.k = at::cat({state.k, in.k}, 1);
  }
  const at::Tensor& kept = rows.k_far.defined() ? rows.k_far : rows.k;
  next.k = next_window(kept, state.lengths, num_sinks, window_size, seqlen);
  next.v = next_window(rows.v, state.lengths, num_sinks, window_size, seqlen);
  next.lengths = state.lengths + seqlen;
  return {row_attention(in, rows, num_sinks), next};
}

std::pair<at::Tensor, LayerState> dense_chunk(const AttentionSettings& settings, const AttentionInputs& in,
                                              const LayerState& state) {
  const int64_t cache = settings.dense_cache, seqlen = in.q.size(1), batch = in.q.size(0);
  Rows rows;
  rows.k = at::cat({state.k, in.k}, 1);
  rows.v = at::cat({state.v, in.v}, 1);
  rows.window_begin =
      (cache - state.lengths).clamp_min(0).to(at::kInt).unsqueeze(1).expand({batch, seqlen}).contiguous();
  rows.far_begin = at::zeros({batch, cache + seqlen}, rows.window_begin.options());
  rows.far_end = rows.far_begin;
  LayerState next;
  next.k = rows.k.narrow(1, seqlen, cache);
  next.v = rows.v.narrow(1, seqlen, cache);
  next.lengths = state.lengths + seqlen;
  return {row_attention(in, rows, 0), next};
}

}  // namespace

std::pair<at::Tensor, LayerState> attend_rows(const AttentionSettings& settings, const AttentionInputs& in,
                                              const Layout& layout, const LayerState* state) {
  if (settings.attention.kind == model::AttentionKind::kDense) return dense_chunk(settings, in, *state);
  if (state != nullptr) return window_chunk(settings, in, *state);
  Rows rows{in.k, in.v, in.k_far, {}, {}, {}};
  std::tie(rows.window_begin, rows.far_begin, rows.far_end, std::ignore) =
      ops::call_window_rows(in.q, {}, layout.cu_seqlens, settings.attention.window_size, settings.attention.num_sinks);
  return {row_attention(in, rows, settings.attention.num_sinks), {}};
}

}  // namespace sparsek::train
