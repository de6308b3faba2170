#include "train/layout.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

namespace sparsek::train {

Layout make_layout(const model::Rope& rope, int64_t batch, int64_t seqlen, std::vector<int32_t> document_ends,
                   std::vector<int64_t> positions, at::Device device, at::ScalarType dtype) {
  Layout layout;
  layout.batch = batch;
  layout.seqlen = seqlen;
  std::vector<at::Tensor> cos, sin;
  // Tables for plain operations are as wide as a head, (cos | cos) and (-sin | sin).
  const auto half = static_cast<int64_t>(rope.inverse_frequencies().size());
  const auto to_device = [&](const at::Tensor& angles) {
    return angles.narrow(-1, angles.size(-1) - half, half).to(device, dtype).contiguous().unsqueeze(-2);
  };
  if (!document_ends.empty()) {
    TORCH_CHECK(batch == 1 && positions.empty() && document_ends.back() == seqlen,
                "make_layout: packed documents are one row that they fill");
    std::vector<int32_t> bounds = {0};
    bounds.insert(bounds.end(), document_ends.begin(), document_ends.end());
    int64_t longest = 0;
    for (size_t i = 1; i < bounds.size(); ++i) longest = std::max<int64_t>(longest, bounds[i] - bounds[i - 1]);
    const model::RotaryTable table = rope.table(0, longest);
    for (size_t i = 1; i < bounds.size(); ++i) {
      cos.push_back(table.cos.narrow(0, 0, bounds[i] - bounds[i - 1]));
      sin.push_back(table.sin.narrow(0, 0, bounds[i] - bounds[i - 1]));
    }
    layout.cos = to_device(at::cat(cos, 0).unsqueeze(0));
    layout.sin = to_device(at::cat(sin, 0).unsqueeze(0));
    layout.cu_seqlens = at::tensor(bounds, at::kInt).to(device);
    layout.document_ends = std::move(document_ends);
  } else {
    const bool same = positions.empty() ||
                      std::all_of(positions.begin(), positions.end(), [&](int64_t p) { return p == positions[0]; });
    for (int64_t row = 0; row < (same ? 1 : batch); ++row) {
      const model::RotaryTable table = rope.table(positions.empty() ? 0 : positions[row], seqlen);
      cos.push_back(table.cos);
      sin.push_back(table.sin);
    }
    layout.cos = to_device(at::stack(cos, 0));
    layout.sin = to_device(at::stack(sin, 0));
    layout.positions = std::move(positions);
  }
  if (rope.far().cos.defined()) {
    layout.far_cos = to_device(rope.far().cos.unsqueeze(0));
    layout.far_sin = to_device(rope.far().sin.unsqueeze(0));
  }
  return layout;
}

}  // namespace sparsek::train
