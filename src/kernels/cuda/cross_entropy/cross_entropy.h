// The loss of logits against next tokens and against a teacher's logits, with the gradient written over the logits: a
// row comes from memory once, and goes back once.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/params.h"

namespace sparsek::cuda {

// With p = softmax(logits), p_t = softmax(teacher), all of a row, natural logarithms, arithmetic in float32:
//   losses = -log p[target], divergences = sum of p_t (log p_t - log p),
//   gradient = next_token_weight (p - onehot(target)) + kl_weight (p - p_t), 0 in ignored rows.
// A target outside the vocabulary that is not `ignored` makes its row's loss and gradient NaN.
struct CrossEntropyParams {
  void* logits = nullptr;            // [rows, vocab_size] contiguous; becomes the gradient where `writes_gradient`
  const void* teacher = nullptr;     // likewise, not written; null: no teacher
  const int64_t* targets = nullptr;  // [rows]
  float* losses = nullptr;           // [rows]; 0 in ignored rows
  float* divergences = nullptr;      // [rows]; likewise; null without a teacher
  int64_t rows = 0, ignored = -100;  // the target that counts for nothing
  int32_t vocab_size = 0;
  float next_token_weight = 1, kl_weight = 0;
  bool writes_gradient = false;
  DType dtype = DType::kBF16;  // of logits and teacher: bfloat16 or float16
};
void cross_entropy(const CrossEntropyParams& params, cudaStream_t stream);

}  // namespace sparsek::cuda
