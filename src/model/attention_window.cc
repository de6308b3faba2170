// Window attention with sinks: each query sees the last window_size keys and the document's first num_sinks keys,
// nothing else; constant memory. Sinks that left the window sit at the constant rotary distance of eq. 9 when it is on.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "model/attention.h"
#include "ops/transformer_ops.h"

namespace sparsek::model {
namespace {

class WindowAttention final : public Attention {
 public:
  WindowAttention(const ModelConfig& config, const AttentionConfig& attention, const Placement& placement)
      : num_kv_heads_(config.num_kv_heads),
        head_dim_(config.head_dim),
        window_size_(attention.window_size),
        num_sinks_(attention.num_sinks),
        placement_(placement) {}

  LayerState new_state(int64_t /*layer*/) const override {
    LayerState state;
    state.k = at::zeros({num_kv_heads_, num_sinks_ + window_size_, head_dim_}, placement_.options());
    state.v = at::zeros({num_kv_heads_, num_sinks_ + window_size_, head_dim_}, placement_.options());
    return state;
  }

  at::Tensor forward(const AttentionInputs& in, int64_t, int64_t position, LayerState& state) const override {
    const bool is_step = in.q.size(1) == 1;
    if (is_step) keep(in, position, state);  // one query sees its ring whole, in any order: read the state in place
    const at::Tensor out =
        ops::row_attention(is_step ? step_rows(in, position, state) : chunk_rows(in, position, state));
    if (!is_step) keep(in, position, state);
    return out;
  }

 private:
  static at::Tensor as_rows(const at::Tensor& head_major) { return head_major.transpose(0, 1).unsqueeze(0); }

  ops::RowAttentionInputs common(const AttentionInputs& in, int64_t rows) const {
    ops::RowAttentionInputs row_inputs;
    row_inputs.q = in.q;
    row_inputs.q_far = in.q_far;
    row_inputs.num_carried = rows - in.q.size(1);
    row_inputs.softmax_scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
    row_inputs.window_begin = at::empty({in.q.size(1)}, at::kInt);
    row_inputs.far_begin = at::empty({rows}, at::kInt);
    row_inputs.far_end = at::empty({rows}, at::kInt);
    return row_inputs;
  }

  // Rows: sinks | ring rows as they lie, the new token among them.
  ops::RowAttentionInputs step_rows(const AttentionInputs& in, int64_t position, const LayerState& state) const {
    const int64_t rows = num_sinks_ + std::min(position + 1, window_size_);
    ops::RowAttentionInputs out = common(in, rows);
    out.k = as_rows(state.k.narrow(1, 0, rows));
    out.v = as_rows(state.v.narrow(1, 0, rows));
    if (in.q_far.defined()) out.k_far = out.k;  // the state's sinks are far keys, its ring window keys
    out.window_begin.fill_(num_sinks_);
    const int64_t num_far = std::clamp(position + 1 - window_size_, int64_t{0}, num_sinks_);
    out.far_begin.zero_();
    out.far_end.zero_();
    out.far_end.narrow(0, 0, num_far).fill_(1);
    return out;
  }

  // Rows: sinks | the last ring rows in order | the chunk's own keys.
  ops::RowAttentionInputs chunk_rows(const AttentionInputs& in, int64_t position, const LayerState& state) const {
    const int64_t tokens = in.q.size(1), carried = std::min(position, window_size_ - 1);
    const int64_t own = num_sinks_ + carried, rows = own + tokens;
    ops::RowAttentionInputs out = common(in, rows);
    at::Tensor k = at::empty({num_kv_heads_, rows, head_dim_}, placement_.options());
    at::Tensor v = at::empty({num_kv_heads_, rows, head_dim_}, placement_.options());
    gather(state.k, in.k, position, k);
    gather(state.v, in.v, position, v);
    if (in.q_far.defined()) {
      at::Tensor k_far = k;
      if (position < num_sinks_) {  // sinks among the chunk's own keys
        k_far = at::empty({num_kv_heads_, rows, head_dim_}, placement_.options());
        k_far.narrow(1, 0, num_sinks_).copy_(state.k.narrow(1, 0, num_sinks_));
        k_far.narrow(1, own, tokens).copy_(in.k_far.squeeze(0).transpose(0, 1));
      }
      out.k_far = as_rows(k_far);
    }
    out.k = as_rows(k);
    out.v = as_rows(v);

    int32_t* window_begin = out.window_begin.mutable_data_ptr<int32_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      window_begin[t] = static_cast<int32_t>(std::max(own + t - (window_size_ - 1), num_sinks_));
    }
    // Sink j is far from query j + window_size on. Other rows are never far; begins may not decrease along the rows.
    int32_t* far_begin = out.far_begin.mutable_data_ptr<int32_t>();
    int32_t* far_end = out.far_end.mutable_data_ptr<int32_t>();
    int64_t latest = 0;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sink = -1;
      if (r < num_sinks_ && r < position) sink = r;
      if (r >= own && position + r - own < num_sinks_) sink = position + r - own;
      if (sink >= 0) latest = std::clamp(sink + window_size_ - position, latest, tokens);
      far_begin[r] = static_cast<int32_t>(latest);
      far_end[r] = static_cast<int32_t>(sink >= 0 ? tokens : latest);
    }
    return out;
  }

  // rows = sinks | the last min(position, window_size - 1) ring rows in order | own.
  void gather(const at::Tensor& kept, const at::Tensor& own, int64_t position, at::Tensor& rows) const {
    rows.narrow(1, 0, num_sinks_).copy_(kept.narrow(1, 0, num_sinks_));
    const int64_t carried = std::min(position, window_size_ - 1);
    for (int64_t done = 0; done < carried;) {  // two pieces when the ring wraps
      const int64_t at = (position - carried + done) % window_size_;
      const int64_t count = std::min(carried - done, window_size_ - at);
      rows.narrow(1, num_sinks_ + done, count).copy_(kept.narrow(1, num_sinks_ + at, count));
      done += count;
    }
    rows.narrow(1, num_sinks_ + carried, own.size(1)).copy_(own.squeeze(0).transpose(0, 1));
  }

  // Puts the chunk's sinks and its last keys into the state.
  void keep(const AttentionInputs& in, int64_t position, LayerState& state) const {
    const int64_t tokens = in.q.size(1);
    const at::Tensor k = in.k.squeeze(0).transpose(0, 1), v = in.v.squeeze(0).transpose(0, 1);
    const at::Tensor sink_k = in.k_far.defined() ? in.k_far.squeeze(0).transpose(0, 1) : k;
    if (position < num_sinks_) {
      const int64_t count = std::min(tokens, num_sinks_ - position);
      state.k.narrow(1, position, count).copy_(sink_k.narrow(1, 0, count));
      state.v.narrow(1, position, count).copy_(v.narrow(1, 0, count));
    }
    for (int64_t t = std::max(tokens - window_size_, int64_t{0}); t < tokens;) {
      const int64_t at = (position + t) % window_size_;
      const int64_t count = std::min(tokens - t, window_size_ - at);
      state.k.narrow(1, num_sinks_ + at, count).copy_(k.narrow(1, t, count));
      state.v.narrow(1, num_sinks_ + at, count).copy_(v.narrow(1, t, count));
      t += count;
    }
  }

  int64_t num_kv_heads_, head_dim_, window_size_, num_sinks_;
  Placement placement_;
};

}  // namespace

std::unique_ptr<Attention> make_window_attention(const ModelConfig& config, const AttentionConfig& attention,
                                                 const Placement& placement) {
  return std::make_unique<WindowAttention>(config, attention, placement);
}

}  // namespace sparsek::model
