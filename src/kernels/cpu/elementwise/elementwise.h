// The small operations between a transformer's matrix products, on the CPU: normalisation, rotary positions, SwiGLU,
// cross entropy. No autograd; matrix products are in kernels/cpu/linear.
//
// Strides count elements; the last dimension is contiguous. A DType here is kBF16 or kF32; arithmetic is float32
// whatever it is. Any number of rows, also 0; any size of the last dimension. Rows are shared between OpenMP threads
// unless the work is too small to pay for it. Results do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "base/dtype.h"

namespace sparsek::cpu {

// x += y (when y is given), then out = x / sqrt(mean(x^2) + eps) * weight (when out is given), row by row.
struct RmsNormParams {
  DType y_dtype = DType::kBF16;
  DType out_dtype = DType::kBF16;
  float* x = nullptr;             // [rows, dim] residual stream; written only when y is given
  const void* y = nullptr;        // [rows, dim] or null
  const float* weight = nullptr;  // [dim]; not read without out
  void* out = nullptr;            // [rows, dim] or null; may be x itself when out_dtype is kF32
  int64_t x_stride = 0, y_stride = 0, out_stride = 0;
  int32_t rows = 0, dim = 0;
  float eps = 0;
};
void rms_norm(const RmsNormParams& params);

// Every head by itself, in place (q/k norm): x = x / sqrt(mean over head_dim(x^2) + eps) * weight.
struct HeadNormParams {
  DType dtype = DType::kBF16;
  void* x = nullptr;              // [tokens, heads, head_dim]
  const float* weight = nullptr;  // [head_dim]
  int64_t token_stride = 0, head_stride = 0;
  int32_t tokens = 0, heads = 0, head_dim = 0;
  float eps = 0;
};
void head_norm(const HeadNormParams& params);

// Rotation of the channel pairs (c, c + rotary_dim / 2), c < rotary_dim / 2 ("half-split", as Hugging Face's
// rotate_half):
//     out[c]        = x[c] cos[c] - x[c + half] sin[c]
//     out[c + half] = x[c + half] cos[c] + x[c] sin[c];   channels from rotary_dim on are copied.
struct RotaryParams {
  DType dtype = DType::kBF16;
  const void* x = nullptr;     // [tokens, heads, head_dim]
  void* out = nullptr;         // likewise; x itself (with x's strides) or apart from it
  const float* cos = nullptr;  // [tokens, rotary_dim / 2], rows angle_stride apart
  const float* sin = nullptr;
  int64_t x_token_stride = 0, x_head_stride = 0, out_token_stride = 0, out_head_stride = 0;
  int64_t angle_stride = 0;  // rotary_dim / 2; 0: one row of angles for every token (far rotary, eq. 9)
  int32_t tokens = 0, heads = 0, head_dim = 0, rotary_dim = 0;
};
void rotary(const RotaryParams& params);

// cos and sin [count, half] of (first_position + t) * inv_freq[c], the angle in double (float32 angles are off by 0.06
// at position 1M). `scale` multiplies both.
void rotary_table(int64_t first_position, int32_t count, const double* inv_freq, int32_t half, float* cos, float* sin,
                  double scale = 1.0);

// out = gate * sigmoid(gate) * up. One [rows, 2 * ffn] buffer is gate = buffer, up = buffer + ffn, both strides 2 *
// ffn.
struct SwigluParams {
  DType dtype = DType::kBF16;
  const void* gate = nullptr;  // [rows, ffn]
  const void* up = nullptr;    // [rows, ffn]
  void* out = nullptr;         // [rows, ffn]; may be gate or up itself (with its stride)
  int64_t gate_stride = 0, up_stride = 0, out_stride = 0;
  int32_t rows = 0, ffn = 0;
};
void swiglu(const SwigluParams& params);

// loss = log(sum(exp(logits))) - logits[target] in nats, per row, summed in double. A row that holds NaN has loss NaN.
struct CrossEntropyParams {
  const float* logits = nullptr;     // [rows, vocab]
  const int32_t* targets = nullptr;  // [rows], each in [0, vocab); null: loss is not computed
  double* loss = nullptr;            // [rows]
  int32_t* argmax = nullptr;         // [rows] or null; the smallest index of the largest logit
  int64_t logits_stride = 0;
  int32_t rows = 0, vocab = 0;
};
void cross_entropy(const CrossEntropyParams& params);

}  // namespace sparsek::cpu
