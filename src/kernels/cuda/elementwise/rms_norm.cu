// rms_norm and its gradient: a row is one team's (a warp or a block), which holds it in registers between its sum and
// its result. The gradient of the weight is summed by team over its rows, then by block, then over blocks by a second
// kernel, each in one order.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/elementwise/elementwise.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/launch.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // beyond, teams take several rows
constexpr int kBlocksAMultiprocessor = 2;         // of the gradient: what its registers leave room for
constexpr int kSumColumns = 32, kSumRows = 32;

// kTeam threads a row, kChunks packs of kWidth elements a thread.
template <int kTeam_, int kChunks_, int kWidth_>
struct Shape {
  static constexpr int kTeam = kTeam_, kChunks = kChunks_, kWidth = kWidth_, kTeams = kThreads / kTeam;
  static constexpr int kMaxDim = kTeam * kChunks * kWidth;
};

template <class F>
void dispatch_shape(int dim, bool is_vector, F f) {
  const auto widths = [&](auto width) {
    constexpr int kWidth = width();
    if (dim <= Shape<32, 8, kWidth>::kMaxDim) return f(Shape<32, 8, kWidth>());
    if (dim <= Shape<kThreads, 8, kWidth>::kMaxDim) return f(Shape<kThreads, 8, kWidth>());
    if (dim <= Shape<kThreads, 16, kWidth>::kMaxDim) return f(Shape<kThreads, 16, kWidth>());
    throw std::invalid_argument("rms_norm: dim must be at most " +
                                std::to_string(Shape<kThreads, 16, kWidth>::kMaxDim) + " on a GPU with rows " +
                                (is_vector ? "" : "not ") + "aligned to 16 bytes, got " + std::to_string(dim));
  };
  if (is_vector) return widths(std::integral_constant<int, 4>());
  return widths(std::integral_constant<int, 1>());
}

// The team's sum, the same bits in each of its threads.
template <int kTeam>
__device__ float team_sum(float value, float* partial) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if constexpr (kTeam == 32) {
    return value;
  } else {
    __syncthreads();  // the row before has read partial
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kTeam / 32; ++warp) total += partial[warp];
    return total;
  }
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kWidth = S::kWidth;
  __shared__ float partial[kThreads / 32];
  const int lane = threadIdx.x % S::kTeam;
  for (int64_t row = int64_t{blockIdx.x} * S::kTeams + threadIdx.x / S::kTeam; row < p.rows;
       row += int64_t{gridDim.x} * S::kTeams) {
    Pack<float, kWidth> x[S::kChunks];
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const int c = (i * S::kTeam + lane) * kWidth;
      if (c < p.dim) x[i] = load<kWidth>(p.x + row * p.x_stride + c);
    }
    if (p.update != nullptr) {
      Pack<T, kWidth> update[S::kChunks];
#pragma unroll
      for (int i = 0; i < S::kChunks; ++i) {
        const int c = (i * S::kTeam + lane) * kWidth;
        if (c < p.dim) update[i] = load<kWidth>(static_cast<const T*>(p.update) + row * p.dim + c);
      }
#pragma unroll
      for (int i = 0; i < S::kChunks; ++i) {
        const int c = (i * S::kTeam + lane) * kWidth;
        if (c >= p.dim) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) x[i].at[j] += widen(update[i].at[j]);
        store(p.sum + row * p.dim + c, x[i]);
      }
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      if ((i * S::kTeam + lane) * kWidth >= p.dim) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) squares += x[i].at[j] * x[i].at[j];
    }
    const float total = team_sum<S::kTeam>(squares, partial);
    const float scale = 1.0f / sqrtf(total / static_cast<float>(p.dim) + p.eps);
    if (p.rstd != nullptr && lane == 0) p.rstd[row] = scale;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const int c = (i * S::kTeam + lane) * kWidth;
      if (c >= p.dim) continue;
      const Pack<float, kWidth> weight = load<kWidth>(p.weight + c);
      Pack<T, kWidth> out;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out.at[j] = narrow<T>(x[i].at[j] * scale * weight.at[j]);
      store(static_cast<T*>(p.out) + row * p.out_stride + c, out);
    }
  }
}

// partial_dweight: [gridDim.x, dim], or null.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, S::kChunks > 8 ? 1 : kBlocksAMultiprocessor)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBwdParams p, float* partial_dweight) {
  constexpr int kWidth = S::kWidth;
  __shared__ float partial[kThreads / 32];
  __shared__ float block_dweight[S::kTeams == 1 ? 1 : S::kMaxDim];
  const int lane = threadIdx.x % S::kTeam, team = threadIdx.x / S::kTeam;
  Pack<float, kWidth> dweight[S::kChunks];
#pragma unroll
  for (int i = 0; i < S::kChunks; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dweight[i].at[j] = 0.0f;
  }
  for (int64_t row = int64_t{blockIdx.x} * S::kTeams + team; row < p.rows; row += int64_t{gridDim.x} * S::kTeams) {
    Pack<float, kWidth> y[S::kChunks];
    Pack<T, kWidth> dout[S::kChunks];
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const int c = (i * S::kTeam + lane) * kWidth;
      if (c >= p.dim) continue;
      y[i] = load<kWidth>(p.sum + row * p.dim + c);
      dout[i] = load<kWidth>(static_cast<const T*>(p.dout) + row * p.dim + c);
    }
    const float rstd = p.rstd[row];
    float products = 0.0f;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const int c = (i * S::kTeam + lane) * kWidth;
      if (c >= p.dim) continue;
      const Pack<float, kWidth> weight = load<kWidth>(p.weight + c);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        y[i].at[j] *= rstd;
        const float product = widen(dout[i].at[j]) * y[i].at[j];
        dweight[i].at[j] += product;
        products += product * weight.at[j];
      }
    }
    const float mean = team_sum<S::kTeam>(products, partial) / static_cast<float>(p.dim);
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      const int c = (i * S::kTeam + lane) * kWidth;
      if (c >= p.dim) continue;
      const Pack<float, kWidth> weight = load<kWidth>(p.weight + c);
      Pack<float, kWidth> dx;
      if (p.dsum != nullptr) {
        dx = load<kWidth>(p.dsum + row * p.dim + c);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) dx.at[j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        dx.at[j] += rstd * (widen(dout[i].at[j]) * weight.at[j] - y[i].at[j] * mean);
      }
      store(p.dx + row * p.dim + c, dx);
      if (p.dupdate != nullptr) {
        Pack<T, kWidth> rounded;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) rounded.at[j] = narrow<T>(dx.at[j]);
        store(static_cast<T*>(p.dupdate) + row * p.dim + c, rounded);
      }
    }
  }
  if (partial_dweight == nullptr) return;
  if constexpr (S::kTeams > 1) {
    for (int turn = 0; turn < S::kTeams; ++turn) {
      if (turn == team) {
#pragma unroll
        for (int i = 0; i < S::kChunks; ++i) {
          const int c = (i * S::kTeam + lane) * kWidth;
          if (c >= p.dim) continue;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            if (turn > 0) dweight[i].at[j] += block_dweight[c + j];
            block_dweight[c + j] = dweight[i].at[j];
          }
        }
      }
      __syncthreads();
    }
  }
  if (team != S::kTeams - 1) return;  // the last one's hold the sum
#pragma unroll
  for (int i = 0; i < S::kChunks; ++i) {
    const int c = (i * S::kTeam + lane) * kWidth;
    if (c < p.dim) store(partial_dweight + int64_t{blockIdx.x} * p.dim + c, dweight[i]);
  }
}

__global__ void __launch_bounds__(kSumColumns * kSumRows)
    sum_rows_kernel(const float* rows, float* sums, int num_rows, int dim) {
  __shared__ float partial[kSumRows][kSumColumns];
  const int column = threadIdx.x % kSumColumns, first = threadIdx.x / kSumColumns;
  const int c = blockIdx.x * kSumColumns + column;
  float sum = 0.0f;
  if (c < dim) {
#pragma unroll 4
    for (int row = first; row < num_rows; row += kSumRows) sum += rows[int64_t{row} * dim + c];
  }
  partial[first][column] = sum;
  __syncthreads();
  if (first > 0 || c >= dim) return;
  for (int i = 1; i < kSumRows; ++i) sum += partial[i][column];
  sums[c] = sum;
}

// As many as run at once, so that each sums its rows' gradients of the weight in registers.
int backward_blocks(const RmsNormBwdParams& p) {
  return static_cast<int>(std::min<int64_t>(p.rows, int64_t{num_multiprocessors()} * kBlocksAMultiprocessor));
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.dim == 0) return;
  const bool is_vector = all_multiples({p.dim, p.x_stride, p.out_stride}, 4) &&
                         all_aligned({p.x, p.weight, p.sum}, 16) && all_aligned({p.update, p.out}, 8);
  dispatch_half(p.dtype, [&](auto type) {
    dispatch_shape(p.dim, is_vector, [&](auto shape) {
      using S = decltype(shape);
      const int64_t blocks = std::min((p.rows + S::kTeams - 1) / S::kTeams, kMaxBlocks);
      rms_norm_kernel<decltype(type), S><<<static_cast<int>(blocks), kThreads, 0, stream>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "rms_norm");
}

int64_t rms_norm_backward_workspace_bytes(const RmsNormBwdParams& p) {
  return p.dweight == nullptr ? 0 : int64_t{backward_blocks(p)} * p.dim * static_cast<int64_t>(sizeof(float));
}

void rms_norm_backward(const RmsNormBwdParams& p, void* workspace, cudaStream_t stream) {
  if (p.dim == 0) return;
  auto* partial_dweight = p.dweight == nullptr ? nullptr : static_cast<float*>(workspace);
  const int blocks = backward_blocks(p);
  if (p.rows > 0) {
    const bool is_vector = p.dim % 4 == 0 && all_aligned({p.dsum, p.sum, p.weight, p.dx}, 16) &&
                           all_aligned({p.dout, p.dupdate}, 8);
    dispatch_half(p.dtype, [&](auto type) {
      dispatch_shape(p.dim, is_vector, [&](auto shape) {
        using T = decltype(type);
        using S = decltype(shape);
        rms_norm_backward_kernel<T, S><<<blocks, kThreads, 0, stream>>>(p, partial_dweight);
      });
    });
    check_cuda(cudaGetLastError(), "rms_norm_backward");
  }
  if (p.dweight == nullptr) return;
  sum_rows_kernel<<<(p.dim + kSumColumns - 1) / kSumColumns, kSumColumns * kSumRows, 0, stream>>>(
      partial_dweight, p.dweight, blocks, p.dim);
  check_cuda(cudaGetLastError(), "rms_norm_backward, weight");
}

}  // namespace sparsek::cuda
