// Row arrays of whole sequences, where row r is position r, and of chunks behind a carried state: one thread per row.
#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/cuda/documents.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/visibility.h"

namespace sparsek::cuda {
namespace {

constexpr int kTile = 32, kTileRows = 8, kThreads = 256;

// --- visibility: [batch, seq, head] in any order of memory -> [batch, head, seq]. A CTA moves tiles of 32 positions by
// 32 heads through shared memory, reading along the smaller stride.

struct TilePlace {
  int64_t batch_row;
  int first_position, first_head;
};

template <class T, class Write>
__device__ void move_tile(const void* in, const Strides& strides, const VisibilityParams& p, const TilePlace& place,
                          T (&tile)[kTile][kTile + 1], Write&& write) {
  const T* from = static_cast<const T*>(in) + place.batch_row * strides.batch;
  const bool along_heads = strides.head <= strides.seq;
  for (int n = threadIdx.y; n < kTile; n += kTileRows) {
    const int position = along_heads ? n : static_cast<int>(threadIdx.x),
              head = along_heads ? static_cast<int>(threadIdx.x) : n;
    const int64_t i = place.first_position + position, h = place.first_head + head;
    if (i < p.seqlen && h < p.num_kv_heads) tile[head][position] = from[i * strides.seq + h * strides.head];
  }
  __syncthreads();
  const int i = place.first_position + threadIdx.x;
  for (int n = threadIdx.y; n < kTile; n += kTileRows) {
    const int h = place.first_head + n;
    if (i < p.seqlen && h < p.num_kv_heads) {
      write((place.batch_row * p.num_kv_heads + h) * p.seqlen + i, tile[n][threadIdx.x]);
    }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) visibility_kernel(const __grid_constant__ VisibilityParams p) {
  __shared__ T values[kTile][kTile + 1];
  __shared__ int32_t indices[kTile][kTile + 1];
  const int tiles = (p.seqlen + kTile - 1) / kTile, batch_row = blockIdx.x / tiles;
  const TilePlace place{batch_row, static_cast<int>(blockIdx.x) % tiles * kTile, static_cast<int>(blockIdx.y) * kTile};
  const int i = place.first_position + threadIdx.x;  // of what this thread writes
  Document document{0, 0, 0};
  if (i < p.seqlen) document = document_of(p.cu_seqlens, p.num_documents, p.seqlen, i);
  const bool is_sink = i - document.begin < p.num_sinks;

  if (p.row_scores) {
    T* to = static_cast<T*>(p.row_scores);
    move_tile(p.scores, p.scores_strides, p, place, values,
              [&](int64_t at, T x) { to[at] = is_sink ? static_cast<T>(INFINITY) : x; });
  }
  if (p.row_tau) {
    T* to = static_cast<T*>(p.row_tau);
    move_tile(p.tau, p.tau_strides, p, place, values, [&](int64_t at, T x) { to[at] = x; });
  }
  if (p.far_end) {
    move_tile(p.expiry, p.index_strides, p, place, indices, [&](int64_t at, int32_t x) {
      p.far_end[at] = is_sink ? document.end : min(x, document.end);
    });
  }
  if (p.row_frac_begin) {
    move_tile(p.frac_begin, p.index_strides, p, place, indices,
              [&](int64_t at, int32_t x) { p.row_frac_begin[at] = min(max(x, 0), p.seqlen); });
  }
  if (p.row_frac_end) {
    move_tile(p.frac_end, p.index_strides, p, place, indices,
              [&](int64_t at, int32_t x) { p.row_frac_end[at] = min(max(x, 0), p.seqlen); });
  }
  if (i >= p.seqlen) return;
  for (int n = threadIdx.y; n < kTile && p.far_begin; n += kTileRows) {
    const int h = place.first_head + n;
    if (h >= p.num_kv_heads) break;
    p.far_begin[(place.batch_row * p.num_kv_heads + h) * p.seqlen + i] =
        static_cast<int32_t>(int64_t{i} + p.window_size);
  }
  if (p.window_begin && blockIdx.y == 0 && threadIdx.y == 0) {
    p.window_begin[place.batch_row * p.seqlen + i] = max(document.begin, i - p.window_size + 1);
  }
}

// --- chunks

// The host checks lengths that it can see (ops/checks.cc) against the same bounds.
__device__ __forceinline__ int64_t clamped_length(const int64_t* lengths, int64_t batch_row) {
  return min(max(lengths[batch_row], int64_t{0}), int64_t{1} << 60);
}

struct ChunkRows {
  const ChunkVisibilityParams& p;
  int64_t length;  // tokens read before the chunk
  int64_t b, h;
  int64_t ring_row, num_rows, num_state_rows;
  __device__ ChunkRows(const ChunkVisibilityParams& params, int64_t lane)
      : p(params),
        b(lane / params.num_kv_heads),
        h(lane % params.num_kv_heads),
        ring_row(int64_t{params.topk} + params.num_sinks),
        num_rows(ring_row + params.window_size + params.chunk),
        num_state_rows(ring_row + params.window_size) {
    length = clamped_length(p.lengths, b);
  }
  __device__ int64_t lane() const { return b * p.num_kv_heads + h; }
  __device__ int64_t position(int64_t row) const { return row - ring_row + length - p.window_size; }

  // Window begins and sinks: the same for every KV head.
  __device__ void position_of_head_0(int64_t n) const {
    if (n < p.chunk) {
      const int64_t first = max(int64_t{0}, length + n - p.window_size + 1);
      p.window_begin[b * p.chunk + n] = static_cast<int32_t>(ring_row + p.window_size + (first - length));
    }
    if (n < num_rows) p.is_sink[b * num_rows + n] = n >= ring_row ? position(n) < p.num_sinks : n >= p.topk;
  }

  __device__ void pool(int64_t n) const {
    const int64_t from = lane() * p.pool_capacity + n, to = lane() * (p.pool_capacity + num_rows) + n;
    p.frac_begin[to] = p.pool_frac_begin[from];
    p.frac_end[to] = p.pool_frac_end[from];
  }

  __device__ void row(int64_t n) const {
    int32_t begin = 0, end, frac_begin = 0, frac_end = 0;
    if (n < p.topk) {
      const int64_t slot = lane() * p.topk + n;
      end = p.slot_expiry[slot], frac_begin = p.slot_frac_begin[slot], frac_end = p.slot_frac_end[slot];
    } else if (n < ring_row) {  // a sink still inside the window is read from its ring row, below
      end = n - p.topk + p.window_size <= length ? p.chunk : 0;
    } else {
      const int64_t t = n - ring_row;
      begin = end = frac_begin = frac_end = static_cast<int32_t>(min(t, int64_t{p.chunk}));
      if (t < p.chunk && position(n) >= p.num_sinks) {
        const int64_t arrival = lane() * p.chunk + t;
        end = p.arrival_expiry[arrival];
        frac_begin = p.arrival_frac_begin[arrival], frac_end = p.arrival_frac_end[arrival];
      } else if (t < p.chunk && position(n) >= 0 && position(n) + p.window_size > length) {
        end = p.chunk;  // at t = 0 the carried row of that position already serves
      }
    }
    p.far_begin[lane() * num_rows + n] = begin;
    p.far_end[lane() * num_rows + n] = end;
    const int64_t frac = lane() * (p.pool_capacity + num_rows) + p.pool_capacity + n;
    p.frac_begin[frac] = frac_begin;
    p.frac_end[frac] = frac_end;
  }

  // Where carried row n comes from, in a state's order [ sinks | ring | slots ].
  __device__ int64_t carried(int64_t n) const {
    if (n < p.topk) return p.num_sinks + p.window_size + n;
    if (n < ring_row) return n - p.topk;
    return p.num_sinks + (length + n - ring_row) % p.window_size;
  }
  // The row that becomes row n of the new state.
  __device__ int64_t kept(int64_t n) const {
    const auto row_of_position = [&](int64_t x) { return ring_row + p.window_size + (x - length); };
    if (n < p.num_sinks) return n >= length && n < length + p.chunk ? row_of_position(n) : p.topk + n;
    if (n < p.num_sinks + p.window_size) {  // ring row r holds the last position that is r modulo window_size
      const int64_t r = n - p.num_sinks, last = length + p.chunk - 1;
      return row_of_position(last - ((last - r) % p.window_size + p.window_size) % p.window_size);
    }
    const int64_t slot = n - p.num_sinks - p.window_size;
    const int64_t source = min(int64_t{p.new_slot_source[lane() * p.topk + slot]}, int64_t{p.topk} + p.chunk - 1);
    return source < 0 ? 0 : source < p.topk ? source : p.num_sinks + source;
  }
  __device__ void sources(int64_t n) const {
    p.carried_source[(b * num_state_rows + n) * p.num_kv_heads + h] = lane() * num_state_rows + carried(n);
    p.state_source[lane() * num_state_rows + n] = (b * num_rows + kept(n)) * p.num_kv_heads + h;
  }
};

__global__ void __launch_bounds__(kThreads) chunk_visibility_kernel(const __grid_constant__ ChunkVisibilityParams p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const ChunkRows rows(p, blockIdx.y);
  if (rows.h == 0) rows.position_of_head_0(n);
  if (n < p.pool_capacity) rows.pool(n);
  if (n < rows.num_rows) rows.row(n);
  if (n < rows.num_state_rows) rows.sources(n);
}

// --- rows of eq. 1b

__global__ void __launch_bounds__(kThreads) carried_window_rows_kernel(const __grid_constant__ WindowRowsParams p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, b = blockIdx.y;
  const int64_t num_rows = int64_t{p.num_sinks} + p.window_size + p.seqlen, length = clamped_length(p.lengths, b);
  if (n < p.seqlen) {
    const int64_t first = max(int64_t{0}, length + n - p.window_size + 1);
    p.window_begin[b * p.seqlen + n] = static_cast<int32_t>(p.num_sinks + p.window_size + (first - length));
  }
  if (n >= num_rows) return;
  int32_t begin = 0, end;
  if (n < p.num_sinks) {
    end = n + p.window_size <= length ? p.seqlen : 0;
  } else {
    const int64_t t = n - p.num_sinks, position = length + t - p.window_size;
    const bool leaves_here = t > 0 && t < p.seqlen && position >= 0 && position < p.num_sinks;
    begin = static_cast<int32_t>(min(t, int64_t{p.seqlen}));
    end = leaves_here ? p.seqlen : begin;
  }
  p.far_begin[b * num_rows + n] = begin;
  p.far_end[b * num_rows + n] = end;
}

__global__ void __launch_bounds__(kThreads) window_rows_kernel(const __grid_constant__ WindowRowsParams p) {
  const int64_t j = int64_t{blockIdx.x} * kThreads + threadIdx.x, at = int64_t{blockIdx.y} * p.seqlen + j;
  if (j >= p.seqlen) return;
  const Document document = document_of(p.cu_seqlens, p.num_documents, p.seqlen, static_cast<int>(j));
  const int64_t half = (int64_t{p.window_size} + 1) / 2, leaves = min(j + p.window_size, int64_t{document.end});
  p.window_begin[at] = static_cast<int32_t>(max(int64_t{document.begin}, j - p.window_size + 1));
  p.far_begin[at] = static_cast<int32_t>(leaves);
  p.far_end[at] = static_cast<int32_t>(j - document.begin < p.num_sinks ? document.end : leaves);
  p.num_queries[at] = static_cast<int32_t>(max(int64_t{0}, leaves - (j + half)));
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

void visibility(const VisibilityParams& params, cudaStream_t stream) {
  assert(params.dtype == DType::kF32 || params.dtype == DType::kF64);
  assert(!params.cu_seqlens || params.batch == 1);
  if (params.batch == 0 || params.seqlen == 0 || params.num_kv_heads == 0) return;
  const dim3 grid((params.seqlen + kTile - 1) / kTile * params.batch, (params.num_kv_heads + kTile - 1) / kTile),
      block(kTile, kTileRows);
  if (params.dtype == DType::kF64)
    visibility_kernel<double><<<grid, block, 0, stream>>>(params);
  else
    visibility_kernel<float><<<grid, block, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "visibility");
}

void chunk_visibility(const ChunkVisibilityParams& params, cudaStream_t stream) {
  const int64_t carried = int64_t{params.topk} + params.num_sinks + params.window_size;
  const int64_t threads = std::max<int64_t>(carried + params.chunk, params.pool_capacity);
  if (params.batch == 0 || params.num_kv_heads == 0) return;
  const dim3 grid(blocks_for(threads), params.batch * params.num_kv_heads);
  chunk_visibility_kernel<<<grid, kThreads, 0, stream>>>(params);
  check_cuda(cudaGetLastError(), "chunk_visibility");
}

void window_rows(const WindowRowsParams& params, cudaStream_t stream) {
  assert(params.lengths == nullptr || params.cu_seqlens == nullptr);
  if (params.batch == 0) return;
  if (params.lengths != nullptr) {
    const dim3 grid(blocks_for(int64_t{params.num_sinks} + params.window_size + params.seqlen), params.batch);
    carried_window_rows_kernel<<<grid, kThreads, 0, stream>>>(params);
  } else if (params.seqlen > 0) {
    window_rows_kernel<<<dim3(blocks_for(params.seqlen), params.batch), kThreads, 0, stream>>>(params);
  }
  check_cuda(cudaGetLastError(), "window_rows");
}

}  // namespace sparsek::cuda
