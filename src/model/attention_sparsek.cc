// SparseK attention over the constant state of section 6: sinks, window, and the topk keys of highest score among those
// that left the window. Where the score comes from:
//   window_mass  r = y of eq. 1b, known when a key leaves the window; nothing is trained
//   key_norm     r = -||k||_2, known at once; nothing is trained (a rotation does not change it)
//   adapter      r from the adapter's scorer, delayed as soon as a layer's alpha is not 0
// Eq. 1 makes u of r, for the untrained ones with a fixed slope alone.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/remainder.h>

#include <algorithm>
#include <array>
#include <vector>

#include "model/attention.h"
#include "model/scorer.h"
#include "model/state_size.h"

namespace sparsek::model {
namespace {

class SparsekAttention final : public Attention {
 public:
  SparsekAttention(const ModelConfig& config, const AttentionConfig& attention, const Placement& placement,
                   const Adapter* adapter)
      : scorer_kind_(attention.scorer),
        delayed_scores_(attention.delayed_scores),
        untrained_(untrained_scale(config.num_kv_heads, attention.slope, placement)) {
    if (adapter != nullptr) {
      timestep_norm_ = adapter->timestep_norm;
      for (const LayerScorer& layer : adapter->layers) scorers_.emplace_back(layer, placement);
    }
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      const AttentionConfig own = attention.of_layer(layer);
      options_.push_back({.topk = own.topk,
                          .window_size = own.window_size,
                          .num_sinks = own.num_sinks,
                          .gate = name(own.gate),
                          .delayed_scores = own.delayed_scores});
      state_options_.push_back(state_options(config, own, placement.dtype));
      state_options_.back().device = placement.device;
    }
  }

  LayerState new_state(int64_t layer) const override {
    LayerState state;
    state.sparsek = ops::new_attention_state(state_options_[layer]);
    return state;
  }

  // Until a layer's window is full no key leaves it, and delayed scores are none: counts the layers with full windows.
  std::optional<int> step_phase(int64_t position) const override {
    return static_cast<int>(std::count_if(options_.begin(), options_.end(), [&](const ops::AttentionOptions& layer) {
      return !delayed_scores_ || position >= layer.window_size;
    }));
  }

  at::Tensor forward(const AttentionInputs& in, int64_t layer, int64_t position,
                     LayerState& layer_state) const override {
    ops::AttentionState& state = layer_state.sparsek;
    const ops::AttentionOptions& options = options_[layer];
    const auto far = [](const at::Tensor& x) { return x.defined() ? ops::MaybeTensor(x) : std::nullopt; };
    const ops::MaybeTensor q_far = far(in.q_far), k_far = far(in.k_far);
    const bool is_step = in.q.size(1) == 1;

    at::Tensor y, ring_mass;  // y of the keys that leave the window at the chunk's queries
    if (delayed_scores_) {
      if (is_step) {
        y = ops::leaving_mass(state, options);
      } else {
        std::tie(y, ring_mass) = ops::window_mass_chunk(in.q, in.k, state, options, q_far, k_far);
      }
    }
    at::Tensor ring_scores;
    at::Tensor raw = y;
    if (scorer_kind_ == ScorerKind::kKeyNorm) {
      raw = at::linalg_vector_norm(in.k, 2, at::IntArrayRef{-1}, false, at::kFloat).neg_();
    } else if (scorer_kind_ == ScorerKind::kAdapter) {
      const Scorer& scorer = scorers_[layer];
      raw = scorer(in.x).view({in.q.size(0), in.q.size(1), -1});
      if (delayed_scores_) {
        ring_scores = is_step ? state.ring_scores : state.ring_scores.clone();
        raw = exchange(raw, state.lengths, options.window_size, ring_scores).add(y, scorer.alpha);
      }
    }
    // Delayed: query t's key has position position + t - window_size, and there is none before the document's start.
    const int64_t num_missing = delayed_scores_ ? options.window_size - position : 0;
    const ScoreScale& scale = scorers_.empty() ? untrained_ : scorers_[layer].scale;
    const auto [scores, stats] = normalise(raw, scale, num_missing, state.stats);

    at::Tensor out;
    if (is_step) {
      out = ops::decode_step(in.q, in.k, in.v, scores, state, options, q_far, k_far);
    } else {
      at::Tensor softmax_lse;
      ops::AttentionState next;
      std::tie(out, softmax_lse, next) = ops::attention_chunk(in.q, in.k, in.v, scores, state, options, q_far, k_far);
      state = std::move(next);
      if (ring_mass.defined()) state.ring_mass = std::move(ring_mass);
    }
    if (is_step) {
      state.stats.copy_(stats);  // a step changes its state in place, ring_scores too
    } else {
      state.stats = stats;
      if (ring_scores.defined()) state.ring_scores = std::move(ring_scores);
    }
    return out;
  }

 private:
  // Puts the raw scores of the chunk's tokens [batch, tokens, num_kv_heads] into the ring [batch, num_kv_heads,
  // window_size] and returns those of the keys that leave it, one per query; zeros stand where there is none yet.
  static at::Tensor exchange(const at::Tensor& raw, const at::Tensor& lengths, int64_t window,
                             at::Tensor& ring_scores) {
    const int64_t tokens = raw.size(1), kept = std::min(tokens, window);
    const std::array<int64_t, 3> shape{raw.size(0), raw.size(2), kept};
    const at::Tensor before = ring_scores.gather(2, ring_rows(lengths, kept, window).expand(shape)).transpose(1, 2);
    at::Tensor leaving = tokens > window ? at::cat({before, raw.narrow(1, 0, tokens - window)}, 1) : before;
    ring_scores.scatter_(2, ring_rows(lengths + (tokens - kept), kept, window).expand(shape),
                         raw.narrow(1, tokens - kept, kept).transpose(1, 2));
    return leaving;
  }

  // Ring rows of the positions first .. first + count - 1; first [batch], rows [batch, 1, count].
  static at::Tensor ring_rows(const at::Tensor& first, int64_t count, int64_t window) {
    return at::remainder(first.view({-1, 1, 1}) + at::arange(count, first.options()), window);
  }

  // Eq. 1: raw [batch, tokens, num_kv_heads] -> (scores, new stats). The first num_missing rows are no keys: they
  // neither enter the statistics nor get a score.
  std::tuple<at::Tensor, at::Tensor> normalise(const at::Tensor& raw, const ScoreScale& scale, int64_t num_missing,
                                               const at::Tensor& stats) const {
    if (num_missing >= raw.size(1)) return {raw, stats};
    const auto eq1 = [&](const at::Tensor& rows) {
      return ops::normalise_scores(rows, scale.beta, scale.gamma, scale.slope, stats, {}, timestep_norm_);
    };
    if (num_missing <= 0) return eq1(raw);
    const auto [real, new_stats] = eq1(raw.narrow(1, num_missing, raw.size(1) - num_missing));
    return {at::cat({raw.narrow(1, 0, num_missing), real}, 1), new_stats};
  }

  ScorerKind scorer_kind_;
  bool delayed_scores_;
  bool timestep_norm_ = false;
  std::vector<Scorer> scorers_;                 // one a layer, adapters only
  ScoreScale untrained_;                        // without an adapter
  std::vector<ops::AttentionOptions> options_;  // one a layer, as the next
  std::vector<ops::AttentionStateOptions> state_options_;
};

}  // namespace

std::unique_ptr<Attention> make_sparsek_attention(const ModelConfig& config, const AttentionConfig& attention,
                                                  const Placement& placement, const Adapter* adapter) {
  return std::make_unique<SparsekAttention>(config, attention, placement, adapter);
}

}  // namespace sparsek::model
