// eq. 2 of docs/math.md on the rows of a matrix, on the GPU.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/params.h"

namespace sparsek::cuda {

// Pointers on the device; float32 or float64. A row with a value that is not finite is NaN, its tau too.
void sparsek(const SparsekParams& params, cudaStream_t stream);

// The gradient of eq. 2: dz_b = dp_b - mean of dp over F for b in F = {0 < p < 1}, else 0. The sum over F is in double.
struct SparsekBwdParams {
  DType dtype;
  const void* dp;  // [rows, columns]
  const void* p;   // [rows, columns]
  void* dz;        // [rows, columns]
  int64_t rows, columns;
};
void sparsek_backward(const SparsekBwdParams& params, cudaStream_t stream);

}  // namespace sparsek::cuda
