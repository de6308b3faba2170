// Picks the instruction set of every kernel of elementwise.h, and the table of rotary angles.
#include "kernels/cpu/elementwise/elementwise.h"

#include <cmath>

#include "kernels/cpu/simd/dispatch.h"

namespace sparsek::cpu {

#define SPARSEK_DECLARE_ELEMENTWISE(isa)         \
  namespace isa {                                \
  void rms_norm(const RmsNormParams&);           \
  void head_norm(const HeadNormParams&);         \
  void rotary(const RotaryParams&);              \
  void swiglu(const SwigluParams&);              \
  void cross_entropy(const CrossEntropyParams&); \
  }
SPARSEK_DECLARE_ELEMENTWISE(portable)
SPARSEK_DECLARE_ELEMENTWISE(avx2)
SPARSEK_DECLARE_ELEMENTWISE(avx512)

namespace {
template <class Params>
using Kernels = PerIsa<void (*)(const Params&)>;
constexpr Kernels<RmsNormParams> kRmsNorm{&portable::rms_norm, &avx2::rms_norm, &avx512::rms_norm};
constexpr Kernels<HeadNormParams> kHeadNorm{&portable::head_norm, &avx2::head_norm, &avx512::head_norm};
constexpr Kernels<RotaryParams> kRotary{&portable::rotary, &avx2::rotary, &avx512::rotary};
constexpr Kernels<SwigluParams> kSwiglu{&portable::swiglu, &avx2::swiglu, &avx512::swiglu};
constexpr Kernels<CrossEntropyParams> kCrossEntropy{&portable::cross_entropy, &avx2::cross_entropy,
                                                    &avx512::cross_entropy};
}  // namespace

void rms_norm(const RmsNormParams& params) {
  kRmsNorm.active()(params);
}
void head_norm(const HeadNormParams& params) {
  kHeadNorm.active()(params);
}
void rotary(const RotaryParams& params) {
  kRotary.active()(params);
}
void swiglu(const SwigluParams& params) {
  kSwiglu.active()(params);
}
void cross_entropy(const CrossEntropyParams& params) {
  kCrossEntropy.active()(params);
}

void rotary_table(int64_t first_position, int32_t count, const double* inv_freq, int32_t half, float* cos, float* sin,
                  double scale) {
  for (int64_t t = 0; t < count; ++t) {
    const double position = static_cast<double>(first_position + t);
    for (int64_t c = 0; c < half; ++c) {
      const double angle = position * inv_freq[c];
      cos[t * half + c] = static_cast<float>(scale * std::cos(angle));
      sin[t * half + c] = static_cast<float>(scale * std::sin(angle));
    }
  }
}

}  // namespace sparsek::cpu
