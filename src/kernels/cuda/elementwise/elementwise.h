// The small operations between a transformer's matrix products on the GPU, one launch each: torch's own take two to
// four. Activations are bfloat16, arithmetic float32, strides count elements, last dimensions are contiguous. Any
// number of rows, also 0.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sparsek::cuda {

// out = x / sqrt(mean(x^2) + eps) * weight, row by row.
struct RmsNormParams {
  const float* x = nullptr;       // [rows, dim] residual stream
  const float* weight = nullptr;  // [dim]
  void* out = nullptr;            // [rows, dim] bfloat16
  int64_t x_stride = 0, out_stride = 0, rows = 0;
  int32_t dim = 0;
  float eps = 0;
};
void rms_norm(const RmsNormParams& params, cudaStream_t stream);

// Rotation of the channel pairs (c, c + head_dim / 2): out[c] = x[c] cos[c] + x[pair of c] sin[c], where sin holds
// (-sin | sin).
struct RotaryParams {
  const void* x = nullptr;     // [tokens, heads, head_dim] bfloat16
  void* out = nullptr;         // likewise; x itself (with x's strides) or apart from it
  const float* cos = nullptr;  // [tokens, head_dim], rows angle_stride apart
  const float* sin = nullptr;
  int64_t x_token_stride = 0, x_head_stride = 0, out_token_stride = 0, out_head_stride = 0;
  int64_t angle_stride = 0;  // 0: one row of angles for every token (far rotary, eq. 9)
  int64_t tokens = 0;
  int32_t heads = 0, head_dim = 0;
};
void rotary(const RotaryParams& params, cudaStream_t stream);

// gate = gate * sigmoid(gate) * up, in place.
struct SwigluParams {
  void* gate = nullptr;      // [rows, ffn] bfloat16
  const void* up = nullptr;  // likewise
  int64_t gate_stride = 0, up_stride = 0, rows = 0;
  int32_t ffn = 0;
};
void swiglu(const SwigluParams& params, cudaStream_t stream);

}  // namespace sparsek::cuda
