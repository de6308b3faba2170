// The loss of hidden states against next tokens, a block of rows at a time: logits of all tokens never exist. Gradients
// are computed on the way, so a row's logits are made once.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace sparsek::train {

// Targets that count for nothing: padding, and a document's last token. As PyTorch has it.
inline constexpr int64_t kIgnored = -100;

struct Teacher {
  at::Tensor hidden;  // [tokens, dim] of the model to stay close to; undefined without
  at::Tensor output;  // [vocab_size, dim]
};

struct LossWeights {
  double next_token = 1, kl = 0;
  int64_t rows = 2048;  // tokens whose logits exist at once
};

struct TokenLoss {
  at::Tensor total;       // scalar, differentiable: next_token * cross-entropy + kl * KL, summed over tokens
  at::Tensor next_token;  // scalar: the sum of cross-entropies, natural log
  at::Tensor kl;          // scalar: the sum of KL(teacher || model); 0 without a teacher
};

// hidden [tokens, dim] in the compute dtype, output [vocab_size, dim], targets int64 [tokens] (kIgnored: no loss). Sums
// are float32 (float64 where the caller works in float64).
TokenLoss token_loss(const at::Tensor& hidden, const at::Tensor& output, const at::Tensor& targets,
                     const LossWeights& weights, const Teacher& teacher = {});

struct TokenScores {
  at::Tensor losses;  // [tokens] cross-entropy, natural log; 0 for ignored ones
  at::Tensor hits;    // bool [tokens]: the target is the most likely token; false for ignored ones
};
// No gradient.
TokenScores token_scores(const at::Tensor& hidden, const at::Tensor& output, const at::Tensor& targets, int64_t rows);

}  // namespace sparsek::train
