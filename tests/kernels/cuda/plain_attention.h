// Attention computed plainly in the precision of the kernels: float32 sums of products of two-byte values, weights and
// logit gradients rounded to two bytes before they are multiplied, results rounded to two bytes. It says how exact a
// kernel can be; it works on rows (kernels/params.h), as the kernels do.
#pragma once
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/bf16.h"
#include "kernels/params.h"
#include "tests/support/generate.h"

namespace sparsek::test {

// Two-byte values as the device has them.
inline uint16_t to_bits(double x, DType dtype) {
  if (dtype == DType::kBF16) return to_bf16(static_cast<float>(x)).bits;
  const __half half = __float2half_rn(static_cast<float>(x));
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline double from_bits(uint16_t bits, DType dtype) {
  return dtype == DType::kBF16 ? to_float(BFloat16{bits}) : half_to_float(bits);
}
inline double rounded(double x, DType dtype) {
  return from_bits(to_bits(x, dtype), dtype);
}
inline std::vector<uint16_t> to_bits(const Values& values, DType dtype) {
  std::vector<uint16_t> bits;
  for (const double x : values) bits.push_back(to_bits(x, dtype));
  return bits;
}
inline Values from_bits(const std::vector<uint16_t>& bits, DType dtype) {
  Values values;
  for (const uint16_t x : bits) values.push_back(from_bits(x, dtype));
  return values;
}

struct PlainAttention {
  // Shapes as in AttentionBwdParams. q, k, v, q_far, k_far, dout and out hold two-byte values, whose products are
  // exact.
  DType dtype;
  int64_t batch, seqlen_q, seqlen_k, num_carried, num_heads, num_kv_heads, head_dim;
  Gate gate;
  double softmax_scale;
  std::vector<float> q = {}, k = {}, v = {}, q_far = {}, k_far = {}, dout = {};
  std::vector<float> scores = {}, tau = {}, dlse = {};
  std::vector<int32_t> window_begin = {}, far_begin = {}, far_end = {};
  std::vector<float> out = {};                                 // result of the forward, input of the backward
  Values dq = {}, dk = {}, dv = {}, dq_far = {}, dk_far = {};  // results

  void forward() {
    out.assign(q.size(), 0);
    for_each_row([&](const Row& row, const std::vector<Key>& keys) {
      float most = -INFINITY, sum = 0;
      std::vector<float> weights;
      for (const Key& key : keys) weights.push_back(logit(row, key)), most = std::max(most, weights.back());
      for (float& x : weights) x = std::exp(x - most), sum += x;
      std::vector<float> result(head_dim);
      for (size_t n = 0; n < keys.size(); ++n)
        add(result.data(), two_bytes(weights[n] / sum * keys[n].gate), &v[keys[n].at]);
      for (int64_t c = 0; c < head_dim; ++c) out[row.at + c] = two_bytes(result[c]);
    });
  }
  // From `out` and `lse` ([batch, num_heads, seqlen_q]) as the backward is given them.
  void backward(const std::vector<float>& lse) {
    std::vector<float> sums[5];
    std::vector<float>&s_dq = sums[0], &s_dk = sums[1], &s_dv = sums[2], &s_dq_far = sums[3], &s_dk_far = sums[4];
    s_dq.resize(q.size()), s_dk.resize(k.size()), s_dv.resize(k.size());
    s_dq_far.resize(q_far.size()), s_dk_far.resize(k_far.size());
    for_each_row([&](const Row& row, const std::vector<Key>& keys) {
      float delta = -dlse[row.lse_at];
      delta += dot(&dout[row.at], &out[row.at]);
      for (const Key& key : keys) {
        const bool far = key.is_far && !q_far.empty();
        const float p = std::exp(logit(row, key) - lse[row.lse_at]);
        add(&s_dv[key.at], two_bytes(p * key.gate), &dout[row.at]);
        const float ds = two_bytes(p * (key.gate * dot(&dout[row.at], &v[key.at]) - delta));
        add(&(far ? s_dq_far : s_dq)[row.at], ds, &(far ? k_far : k)[key.at]);
        add(&(far ? s_dk_far : s_dk)[key.at], ds, &(far ? q_far : q)[row.at]);
      }
    });
    const auto round_all = [&](const std::vector<float>& from, double factor) {
      Values to;
      for (const float x : from) to.push_back(rounded(x * factor, dtype));
      return to;
    };
    dq = round_all(s_dq, softmax_scale), dk = round_all(s_dk, softmax_scale), dv = round_all(s_dv, 1);
    dq_far = round_all(s_dq_far, softmax_scale), dk_far = round_all(s_dk_far, softmax_scale);
  }

 private:
  struct Row {
    int64_t at, lse_at;  // in q and in lse
  };
  struct Key {
    int64_t at;  // in k
    float gate;
    bool is_far;
  };
  template <class Visit>
  void for_each_row(const Visit& visit) const {
    const int64_t group = num_heads / num_kv_heads;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t kv = 0; kv < num_kv_heads; ++kv) {
        const int64_t lane = b * num_kv_heads + kv;
        for (int64_t i = 0; i < seqlen_q; ++i) {
          std::vector<Key> keys;
          const auto place = [&](int64_t r) { return ((b * seqlen_k + r) * num_kv_heads + kv) * head_dim; };
          for (int64_t r = 0; r < seqlen_k; ++r) {
            if (far_begin[lane * seqlen_k + r] > i || far_end[lane * seqlen_k + r] <= i) continue;
            const float weight = scores[lane * seqlen_k + r] - tau[lane * seqlen_q + i];
            keys.push_back({place(r), gate == Gate::kSoft ? std::fmin(std::fmax(weight, 0.0f), 1.0f) : 1.0f, true});
          }
          for (int64_t r = window_begin[b * seqlen_q + i]; r <= num_carried + i; ++r)
            keys.push_back({place(r), 1, false});
          for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
            visit(Row{((b * seqlen_q + i) * num_heads + head) * head_dim, (b * num_heads + head) * seqlen_q + i}, keys);
          }
        }
      }
    }
  }
  float logit(const Row& row, const Key& key) const {
    const bool far = key.is_far && !q_far.empty();
    return dot(&(far ? q_far : q)[row.at], &(far ? k_far : k)[key.at]) * static_cast<float>(softmax_scale);
  }
  float dot(const float* a, const float* b) const {
    float sums[8] = {};  // a float32 sum of head_dim values in some order
    for (int64_t c = 0; c < head_dim; c += 8) {
      for (int n = 0; n < 8; ++n) sums[n] += a[c + n] * b[c + n];
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
  void add(float* to, float factor, const float* from) const {
    for (int64_t c = 0; c < head_dim; ++c) to[c] += factor * from[c];
  }
  float two_bytes(float x) const { return static_cast<float>(rounded(x, dtype)); }
};

}  // namespace sparsek::test
