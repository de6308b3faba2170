#include "train/warm_start.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/log.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"
#include "train/optimiser.h"

namespace sparsek::train {
namespace {

constexpr int64_t kBlock = 256;  // queries whose attention exists at once
constexpr double kFloor = 1e-9;  // as inside the logarithm of eq. 1b
constexpr int64_t kReportEvery = 20;

}  // namespace

FutureMass future_mass(const AttentionInputs& in, int64_t window_size, int64_t block) {
  const at::NoGradGuard no_grad;
  const int64_t batch = in.q.size(0), seqlen = in.q.size(1), kv_heads = in.k.size(2);
  const at::ScalarType wide = in.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor positions = at::arange(seqlen, in.q.options().dtype(at::kLong));
  at::Tensor mass = at::zeros({batch, kv_heads, seqlen}, in.q.options().dtype(wide));
  for (int64_t first = 0; first < seqlen; first += block) {
    const int64_t count = std::min(block, seqlen - first), keys = first + count;
    const at::Tensor age = positions.narrow(0, first, count).unsqueeze(1) - positions.narrow(0, 0, keys).unsqueeze(0);
    const at::Tensor attention = attention_weights(in, first, count).masked_fill(age.lt(window_size), 0);
    mass.narrow(2, 0, keys).add_(attention.sum(at::IntArrayRef{2, 3}));
  }
  FutureMass result;
  result.counts = (seqlen - window_size - positions).clamp_min(0).to(wide);
  result.log_mass = at::log(mass / result.counts.clamp_min(1) + kFloor).transpose(1, 2);
  return result;
}

bool warm_start(Session& session, const TrainConfig& config, BatchSource& batches,
                const std::function<void(const std::string&)>& notice, const std::function<bool()>& should_stop) {
  const Network& teacher = *session.teacher;
  // What it learns: the scorers alone.
  Parameters scorers = session.network.parameters();
  visit_parameters(scorers, [&](const std::string&, at::Tensor& tensor, Group group) {
    if (!is_of_scorer(group)) tensor = tensor.detach();
  });
  OptimiserOptions options = config.optimiser;
  options.scorer_lr = config.warm_start.lr;
  options.warmup_steps = std::min<int64_t>(options.warmup_steps, config.warm_start.steps / 10);
  Optimiser optimiser(scorers, options, config.warm_start.steps, config.scorer.largest_slope);

  std::vector<AttentionSettings> settings;  // of each layer
  for (size_t layer = 0; layer < scorers.layers.size(); ++layer) {
    settings.push_back(session.network.settings_of_layer(static_cast<int64_t>(layer)));
  }
  int64_t smallest_window = std::numeric_limits<int64_t>::max();
  for (const AttentionSettings& layer : settings) {
    smallest_window = std::min(smallest_window, layer.attention.window_size);
  }
  const std::string begin = batches.position();
  bool has_fitted = false;
  for (int64_t step = 0; step < config.warm_start.steps; ++step) {
    if (should_stop()) return false;
    const Batch batch = batches.next();
    const at::Tensor ids = batch.ids.to(teacher.options().device);
    at::Tensor sum = at::zeros({}, ids.options().dtype(at::kDouble));
    {
      const at::NoGradGuard no_grad;
      // A packed row is fitted document by document.
      std::vector<int32_t> ends = batch.document_ends;
      if (ends.empty()) ends = {static_cast<int32_t>(ids.size(1))};
      int64_t first = 0;
      for (const int32_t end : ends) {
        const int64_t count = end - first;
        const at::Tensor document = ids.narrow(1, first, count);
        first = end;
        if (count <= smallest_window) continue;
        const Layout layout = teacher.layout(ids.size(0), count);
        const double share = static_cast<double>(count) / static_cast<double>(ids.size(1));
        teacher.forward_watched(document, layout, [&](int64_t index, const AttentionInputs& in) {
          const int64_t window_size = settings[index].attention.window_size;
          if (count <= window_size) return;
          const FutureMass target = future_mass(in, window_size, kBlock);
          // Few later queries make a noisy mean: such keys count less.
          const at::Tensor weight = (target.counts / static_cast<double>(window_size)).clamp_max(1).unsqueeze(1);
          const at::AutoGradMode with_grad(true);
          const at::Tensor u = scores(settings[index], scorers.layers[index], in, layout);
          // A constant changes no selection (eq. 2): it is not fitted.
          const at::Tensor error = u - target.log_mass;
          const at::Tensor centred = error - (error * weight).sum(1, /*keepdim=*/true) / weight.sum();
          const at::Tensor loss =
              (centred.pow(2) * weight).sum() / (weight.sum() * static_cast<double>(u.size(0) * u.size(2))) * share;
          loss.backward();
          has_fitted = true;
          sum.add_(loss.detach());
        });
      }
    }
    const double loss = sum.item<double>() / static_cast<double>(scorers.layers.size());
    optimiser.apply(step, std::isfinite(loss));
    if (step % kReportEvery == 0 || step + 1 == config.warm_start.steps) {
      notice(
          fmt::format("warm start {} / {}: squared error of log mass {:.4f}", step + 1, config.warm_start.steps, loss));
    }
  }
  if (!has_fitted) {
    throw_data(
        "warm start: expected documents, in rows or chunks, longer than the smallest window of {} tokens, found none "
        "in {} steps; give longer ones, or warm_start.steps=0",
        smallest_window, config.warm_start.steps);
  }
  batches.seek(begin);
  return true;
}

}  // namespace sparsek::train
