// cross_entropy: see elementwise.h. Two passes over a row: the maximum, then the sum of exp(logit - maximum), where
// every block of kBlock logits is summed in float32 and the blocks in double.
#include <cassert>
#include <cmath>

#include "kernels/cpu/elementwise/elementwise.h"
#include "kernels/cpu/elementwise/rows.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

constexpr int kBlock = 1024;

SPARSEK_INLINE float block_max(const float* x, int count) {
  float best = x[0];
  int c = 0;
  if (count >= kLanes) {
    VecF lanes = load(x);
    for (; c + kLanes <= count; c += kLanes) lanes = max(lanes, load(x + c));
    best = reduce_max(lanes);
  }
  for (; c < count; ++c) best = x[c] > best ? x[c] : best;
  return best;
}

SPARSEK_INLINE float block_sum(const float* x, int count, float maximum) {
  VecF sums[2] = {};
  int c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    sums[0] += exp(load(x + c) - maximum);
    sums[1] += exp(load(x + c + kLanes) - maximum);
  }
  float sum = reduce_add(sums[0] + sums[1]);
  for (; c < count; ++c) sum += std::exp(x[c] - maximum);
  return sum;
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p) {
  for_rows(p.rows, p.vocab, [&](int64_t row) {
    const float* logits = p.logits + row * p.logits_stride;
    float maximum = -INFINITY;
    int best_block = 0;
    for (int begin = 0; begin < p.vocab; begin += kBlock) {
      const float found = block_max(logits + begin, p.vocab - begin < kBlock ? p.vocab - begin : kBlock);
      if (found > maximum) {
        maximum = found;
        best_block = begin;
      }
    }
    if (p.argmax != nullptr) {
      int index = best_block;
      while (index + 1 < p.vocab && index + 1 < best_block + kBlock && logits[index] != maximum) ++index;
      p.argmax[row] = index;
    }
    if (p.targets == nullptr) return;
    assert(p.targets[row] >= 0 && p.targets[row] < p.vocab);
    double sum = 0;
    for (int begin = 0; begin < p.vocab; begin += kBlock) {
      sum +=
          static_cast<double>(block_sum(logits + begin, p.vocab - begin < kBlock ? p.vocab - begin : kBlock, maximum));
    }
    p.loss[row] = std::log(sum) + (static_cast<double>(maximum) - static_cast<double>(logits[p.targets[row]]));
  });
}

}  // namespace sparsek::cpu::SPARSEK_ISA
