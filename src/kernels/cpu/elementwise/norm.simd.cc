// rms_norm and head_norm: see elementwise.h. The sum of squares is float32 in 4 * kLanes partial sums.
#include <cassert>
#include <cmath>

#include "kernels/cpu/elementwise/elementwise.h"
#include "kernels/cpu/elementwise/rows.h"

namespace sparsek::cpu::SPARSEK_ISA {
namespace {

struct NoAddend {};  // stands for y's elements when there is no y; never read

// x[0..kLanes) += y; the sum.
template <class Y>
SPARSEK_INLINE VecF add_to(float* x, const Y* y) {
  const VecF value = load(x) + load_elements(y);
  store(x, value);
  return value;
}
SPARSEK_INLINE VecF add_to(float* x, const NoAddend*) {
  return load(x);
}

template <class Y>
SPARSEK_INLINE VecF add_to(float* x, const Y* y, int count) {
  const VecF value = load_elements(x, count) + load_elements(y, count);
  store_elements(x, value, count);
  return value;
}
SPARSEK_INLINE VecF add_to(float* x, const NoAddend*, int count) {
  return load_elements(x, count);
}

// x[0..dim) += y, and the sum of the squares of what results.
template <class Y>
SPARSEK_INLINE float add_and_square(float* x, const Y* y, int dim) {
  VecF sums[4] = {};
  int c = 0;
  for (; c + 4 * kLanes <= dim; c += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const VecF value = add_to(x + c + part * kLanes, y + c + part * kLanes);
      sums[part] += value * value;
    }
  }
  for (; c + kLanes <= dim; c += kLanes) {
    const VecF value = add_to(x + c, y + c);
    sums[0] += value * value;
  }
  if (c < dim) {
    const VecF value = add_to(x + c, y + c, dim - c);
    sums[1] += value * value;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
SPARSEK_INLINE float sum_of_squares(const T* x, int dim) {
  VecF sums[2] = {};
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    const VecF value = load_elements(x + c);
    sums[(c / kLanes) & 1] += value * value;
  }
  if (c < dim) {
    const VecF value = load_elements(x + c, dim - c);
    sums[0] += value * value;
  }
  return reduce_add(sums[0] + sums[1]);
}

template <class X, class Out>
SPARSEK_INLINE void scale_row(const X* x, const float* weight, float factor, Out* out, int dim) {
  int c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    store_elements(out + c, load_elements(x + c) * factor * load(weight + c));
  }
  if (c < dim) {
    const int count = dim - c;
    store_elements(out + c, load_elements(x + c, count) * factor * load_elements(weight + c, count), count);
  }
}

float norm_factor(float sum_of_squares, int dim, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(dim) + eps);
}

template <class Y, class Out>
void rms_norm_rows(const RmsNormParams& p) {
  for_rows(p.rows, p.dim, [&](int64_t row) {
    float* x = p.x + row * p.x_stride;
    float sum;
    if constexpr (__is_same(Y, NoAddend)) {
      sum = add_and_square(x, reinterpret_cast<const NoAddend*>(x), p.dim);
    } else {
      sum = add_and_square(x, static_cast<const Y*>(p.y) + row * p.y_stride, p.dim);
    }
    if (p.out == nullptr) return;
    scale_row(x, p.weight, norm_factor(sum, p.dim, p.eps), static_cast<Out*>(p.out) + row * p.out_stride, p.dim);
  });
}

template <class Out>
void rms_norm_to(const RmsNormParams& p) {
  if (p.y == nullptr) {
    rms_norm_rows<NoAddend, Out>(p);
  } else if (p.y_dtype == DType::kBF16) {
    rms_norm_rows<BFloat16, Out>(p);
  } else {
    rms_norm_rows<float, Out>(p);
  }
}

template <class T>
void head_norm_as(const HeadNormParams& p) {
  for_rows(p.tokens, int64_t{p.heads} * p.head_dim, [&](int64_t token) {
    T* x = static_cast<T*>(p.x) + token * p.token_stride;
    for (int head = 0; head < p.heads; ++head, x += p.head_stride) {
      scale_row(x, p.weight, norm_factor(sum_of_squares(x, p.head_dim), p.head_dim, p.eps), x, p.head_dim);
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  assert(p.y_dtype == DType::kBF16 || p.y_dtype == DType::kF32);
  assert(p.out_dtype == DType::kBF16 || p.out_dtype == DType::kF32);
  if (p.out_dtype == DType::kBF16) {
    rms_norm_to<BFloat16>(p);
  } else {
    rms_norm_to<float>(p);
  }
}

void head_norm(const HeadNormParams& p) {
  assert(p.dtype == DType::kBF16 || p.dtype == DType::kF32);
  if (p.dtype == DType::kBF16) {
    head_norm_as<BFloat16>(p);
  } else {
    head_norm_as<float>(p);
  }
}

}  // namespace sparsek::cpu::SPARSEK_ISA
