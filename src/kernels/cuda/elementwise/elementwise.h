// The small operations between a transformer's matrix products on the GPU, forward and backward, one pass over memory
// each: torch's own take two to ten launches. Activations are bfloat16 or float16 (`dtype`), the residual stream, norm
// weights and angles float32, arithmetic float32. Strides count elements, last dimensions are contiguous, any number of
// rows, also 0. Rows whose sizes, strides and addresses allow it are read 8 or 16 bytes at a time, others element by
// element. The same bits every time on the same device.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace sparsek::cuda {

// sum = x + update; out = sum / sqrt(mean(sum^2) + eps) * weight, row by row.
struct RmsNormParams {
  const float* x = nullptr;       // [rows, dim] residual stream
  const void* update = nullptr;   // [rows, dim] contiguous; null: sum is x
  const float* weight = nullptr;  // [dim]
  void* out = nullptr;            // [rows, dim]
  float* sum = nullptr;           // [rows, dim] contiguous; with update only
  float* rstd = nullptr;          // [rows] 1 / sqrt(mean(sum^2) + eps), for the gradient; null: not wanted
  int64_t x_stride = 0, out_stride = 0, rows = 0;
  int32_t dim = 0;
  float eps = 0;
  DType dtype = DType::kBF16;  // of update and out
};
// Throws std::invalid_argument when dim is above 16,384 (4,096 where rows are not aligned to 16 bytes).
void rms_norm(const RmsNormParams& params, cudaStream_t stream);

// Everything contiguous. With g = dout * weight, y = sum * rstd: dx = dsum + rstd * (g - y * mean(g * y)),
// dweight = sum of dout * y over rows.
struct RmsNormBwdParams {
  const void* dout = nullptr;     // [rows, dim]
  const float* dsum = nullptr;    // [rows, dim] what else the sum went to; null: nothing
  const float* sum = nullptr;     // [rows, dim] as the forward wrote it, or its x
  const float* rstd = nullptr;    // [rows]
  const float* weight = nullptr;  // [dim]
  float* dx = nullptr;            // [rows, dim]
  void* dupdate = nullptr;        // [rows, dim] dx in the update's type; null: there was none
  float* dweight = nullptr;       // [dim]; null: not wanted
  int64_t rows = 0;
  int32_t dim = 0;
  DType dtype = DType::kBF16;  // of dout and dupdate
};
int64_t rms_norm_backward_workspace_bytes(const RmsNormBwdParams& params);
void rms_norm_backward(const RmsNormBwdParams& params, void* workspace, cudaStream_t stream);

// Heads rotated from one place to another: channel pairs (c, c + head_dim / 2) by the token's angles,
// (low cos - high sin, high cos + low sin).
struct Rotation {
  const void* x = nullptr;     // [batch, tokens, heads, head_dim]; null: none
  const float* cos = nullptr;  // [batch, tokens, head_dim / 2]; null: x as it is
  const float* sin = nullptr;  // likewise
  int64_t x_batch_stride = 0, x_token_stride = 0, x_head_stride = 0;
  int64_t angle_batch_stride = 0, angle_token_stride = 0;  // 0: the same row for every one (far rotary, eq. 9)
  bool is_inverse = false;                                 // by -sin: the gradient
};
// out = first (+ second, with its own angles).
struct RotaryPart {
  Rotation first = {}, second = {};
  void* out = nullptr;  // [batch, tokens, heads, head_dim]; first.x itself (with its strides) or apart from all x
  int64_t out_batch_stride = 0, out_token_stride = 0, out_head_stride = 0;
  int32_t heads = 0;
};
struct RotaryParams {
  static constexpr int kMaxParts = 5;  // q, k, v, far q, far k
  RotaryPart parts[kMaxParts] = {};
  int32_t num_parts = 0, head_dim = 0;
  int64_t batch = 1, tokens = 0;
  DType dtype = DType::kBF16;
};
void rotary(const RotaryParams& params, cudaStream_t stream);

// out = gate * sigmoid(gate) * up.
struct SwigluParams {
  const void* gate = nullptr;  // [rows, ffn]
  const void* up = nullptr;    // likewise
  void* out = nullptr;         // likewise; gate itself or apart from both
  int64_t gate_stride = 0, up_stride = 0, out_stride = 0, rows = 0;
  int32_t ffn = 0;
  DType dtype = DType::kBF16;
};
void swiglu(const SwigluParams& params, cudaStream_t stream);

// dgate_up = (dout * up * s * (1 + gate * (1 - s)) | dout * gate * s), s = sigmoid(gate). Everything contiguous.
struct SwigluBwdParams {
  const void* dout = nullptr;     // [rows, ffn]
  const void* gate_up = nullptr;  // [rows, 2 ffn]
  void* dgate_up = nullptr;       // likewise
  int64_t rows = 0;
  int32_t ffn = 0;
  DType dtype = DType::kBF16;
};
void swiglu_backward(const SwigluBwdParams& params, cudaStream_t stream);

}  // namespace sparsek::cuda
