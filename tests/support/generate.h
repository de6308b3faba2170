// Seeded inputs that can expose errors: values that differ along every axis, scores of every shape that selection finds
// hard, and lengths around tile sizes.
#pragma once
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/bf16.h"

namespace sparsek::test {

using Values = std::vector<double>;

// Normal values, one stream per seed. Not rounded: see round_to_f32 and round_to_bf16.
inline Values normal(int64_t count, uint64_t seed, double std = 1.0, double mean = 0.0) {
  std::mt19937_64 engine(seed * 0x9e3779b97f4a7c15u + 1);
  std::normal_distribution<double> distribution(mean, std);
  Values values(static_cast<size_t>(count));
  for (double& value : values) value = distribution(engine);
  return values;
}

inline Values uniform(int64_t count, uint64_t seed, double low = 0.0, double high = 1.0) {
  std::mt19937_64 engine(seed * 0x9e3779b97f4a7c15u + 2);
  std::uniform_real_distribution<double> distribution(low, high);
  Values values(static_cast<size_t>(count));
  for (double& value : values) value = distribution(engine);
  return values;
}

// Inputs are rounded to the storage type before the reference sees them, so that it computes on what the kernel reads.
inline Values round_to_f32(Values values) {
  for (double& value : values) value = static_cast<double>(static_cast<float>(value));
  return values;
}
inline Values round_to_bf16(Values values) {
  for (double& value : values) value = to_float(to_bf16(static_cast<float>(value)));
  return values;
}
inline std::vector<float> to_f32(const Values& values) {
  return {values.begin(), values.end()};
}
inline std::vector<BFloat16> to_bf16_values(const Values& values) {
  std::vector<BFloat16> result;
  for (double value : values) result.push_back(to_bf16(static_cast<float>(value)));
  return result;
}
// T is float, double or BFloat16.
template <class T>
std::vector<T> to_storage(const Values& values) {
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    return to_bf16_values(values);
  } else {
    return {values.begin(), values.end()};
  }
}

// What the scores of a sequence look like.
enum class ScoreKind {
  kNormalSmall,  // std 0.05: support far larger than topk, F large
  kNormal,       // std 1
  kNormalLarge,  // std 3: F small, S large
  kRising,       // each key above all before it by a little: membership changes at every query
  kRisingSteep,  // by 1.5: F is often empty
  kFalling,      // nothing ever replaces the first topk
  kEqual,        // all ties
  kTies,         // five values only, -0.0 and +0.0 among them
  kFlatRoots,    // integers: f(tau) is flat at its root again and again, F often empty
  kAlternating,  // high, low, high, low, with a drift
  kOffset,       // std 0.3 around 8: sums lose digits
  kHugeSpread,   // magnitudes from 1e-6 to 1e4
};
constexpr ScoreKind kAllScoreKinds[] = {ScoreKind::kNormalSmall, ScoreKind::kNormal,      ScoreKind::kNormalLarge,
                                        ScoreKind::kRising,      ScoreKind::kRisingSteep, ScoreKind::kFalling,
                                        ScoreKind::kEqual,       ScoreKind::kTies,        ScoreKind::kFlatRoots,
                                        ScoreKind::kAlternating, ScoreKind::kOffset,      ScoreKind::kHugeSpread};

inline const char* name(ScoreKind kind) {
  switch (kind) {
    case ScoreKind::kNormalSmall:
      return "NormalSmall";
    case ScoreKind::kNormal:
      return "Normal";
    case ScoreKind::kNormalLarge:
      return "NormalLarge";
    case ScoreKind::kRising:
      return "Rising";
    case ScoreKind::kRisingSteep:
      return "RisingSteep";
    case ScoreKind::kFalling:
      return "Falling";
    case ScoreKind::kEqual:
      return "Equal";
    case ScoreKind::kTies:
      return "Ties";
    case ScoreKind::kFlatRoots:
      return "FlatRoots";
    case ScoreKind::kAlternating:
      return "Alternating";
    case ScoreKind::kOffset:
      return "Offset";
    case ScoreKind::kHugeSpread:
      return "HugeSpread";
  }
  return "?";
}

// Scores [batch, seqlen, num_kv_heads], float32 values, different in every batch row and head.
inline Values make_scores(ScoreKind kind, int64_t batch, int64_t seqlen, int64_t num_kv_heads, uint64_t seed) {
  const int64_t count = batch * seqlen * num_kv_heads;
  const Values noise = normal(count, seed + 1000), unit = uniform(count, seed + 2000);
  Values scores(static_cast<size_t>(count));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t head = n % num_kv_heads, row = n / num_kv_heads / seqlen;
    const double t = static_cast<double>(n / num_kv_heads % seqlen), shift = 0.37 * static_cast<double>(head + row);
    const double z = noise[n], r = unit[n];
    switch (kind) {
      case ScoreKind::kNormalSmall:
        scores[n] = 0.05 * z;
        break;
      case ScoreKind::kNormal:
        scores[n] = z;
        break;
      case ScoreKind::kNormalLarge:
        scores[n] = 3 * z;
        break;
      case ScoreKind::kRising:
        scores[n] = 0.01 * t + 0.004 * r + shift;
        break;
      case ScoreKind::kRisingSteep:
        scores[n] = 1.5 * t + 0.2 * r + shift;
        break;
      case ScoreKind::kFalling:
        scores[n] = -0.02 * t - 0.01 * r + shift;
        break;
      case ScoreKind::kEqual:
        scores[n] = 0.25 + shift;
        break;
      case ScoreKind::kTies: {
        constexpr double kFive[] = {-0.7, -0.0, 0.0, 0.3, 0.9};
        scores[n] = kFive[static_cast<int>(r * 5) % 5];
        break;
      }
      case ScoreKind::kFlatRoots:
        scores[n] = std::floor(r * 9) - 4;
        break;
      case ScoreKind::kAlternating:
        scores[n] = (static_cast<int64_t>(t) % 2 ? 0.8 : -0.8) + 0.001 * t + 0.1 * r + shift;
        break;
      case ScoreKind::kOffset:
        scores[n] = 8 + 0.3 * z;
        break;
      case ScoreKind::kHugeSpread:
        scores[n] = (z < 0 ? -1 : 1) * std::pow(10.0, 10 * r - 6);
        break;
    }
  }
  return round_to_f32(scores);
}

// 1, tile - 1, tile, tile + 1, two tiles and one, and a prime beyond.
inline std::vector<int64_t> lengths_around(int64_t tile) {
  return {1, tile - 1, tile, tile + 1, 2 * tile + 1, 3 * tile + 7};
}

}  // namespace sparsek::test
