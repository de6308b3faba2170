// Lists of far rows from the rows' intervals, in four launches that depend on shapes alone:
//   1. the least and the largest tau of every chunk of queries;
//   2. per part of the rows: how many of its rows every chunk's list takes, by class;
//   3. where in the lists each part's rows go;
//   4. as 2, writing them there.
// A part is walked by chunks of queries, one warp each, over rows in shared memory that are dropped once no later chunk
// sees them. So the work is that of the lists, not of rows times chunks: a selected row lives a few chunks.
#include <algorithm>
#include <cassert>
#include <cmath>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows/live_lists.h"
#include "kernels/cuda/workspace.h"

namespace sparsek::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostParts = 128, kClasses = 3;
// Rows of a part that are in shared memory at once: many where there are many (fewer visits of a chunk's list), few
// where all of them together would not fill the multiprocessors.
constexpr int kLongStep = 1024, kShortStep = 256;

// Of tau in a chunk of queries; both NaN where some tau is: then no weight is known to be one or a fraction.
struct TauRange {
  float least, most;
};

struct Problem {
  const int32_t *far_begin, *far_end;  // [lanes, seqlen_k]
  const float *scores, *tau;           // [lanes, seqlen_k], [lanes, seqlen_q]
  LiveLists lists;
  float* checked_tau;  // [lanes, seqlen_q] tau, NaN where a list was cut
  TauRange* ranges;    // [lanes, num_chunks]
  int32_t* places;     // [lanes, num_chunks, kClasses, num_parts] first the number of a part's rows, then their place
  int32_t lanes, seqlen_q, seqlen_k, chunk, num_chunks, num_parts, part_rows, step;

  __device__ int64_t list(int lane, int c) const { return static_cast<int64_t>(lane) * num_chunks + c; }
};

__global__ void __launch_bounds__(kThreads) tau_range_kernel(const __grid_constant__ Problem p) {
  const int64_t list = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (list >= int64_t{p.lanes} * p.num_chunks) return;
  const int lane = static_cast<int>(list / p.num_chunks), first = static_cast<int>(list % p.num_chunks) * p.chunk;
  const float* tau = p.tau + static_cast<int64_t>(lane) * p.seqlen_q;
  float* const copy = p.checked_tau + static_cast<int64_t>(lane) * p.seqlen_q;
  float least = INFINITY, most = -INFINITY;
  bool is_nan = false;
#pragma unroll 4
  for (int i = first + static_cast<int>(threadIdx.x % 32); i < min(first + p.chunk, p.seqlen_q); i += 32) {
    const float x = tau[i];
    least = fminf(least, x), most = fmaxf(most, x), is_nan |= isnan(x);
    copy[i] = x;
  }
  for (int step = 16; step > 0; step /= 2) {
    least = fminf(least, __shfl_xor_sync(0xffffffffu, least, step));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  if (__any_sync(0xffffffffu, is_nan)) least = most = NAN;
  if (threadIdx.x % 32 == 0) p.ranges[list] = {least, most};
}

template <int kStep>
struct Shared {
  LiveRow rows[kStep];  // those that a chunk yet to come sees, ascending
  int kept[kWarps];
  int first_chunk, last_chunk;
};

// Appends `row` of every thread with `keeps`, in the order of the threads, at `count`, and adds their number to it. All
// threads call it; a thread's row must not lie at or behind `count` in shared memory.
template <int kStep>
__device__ void append(Shared<kStep>& s, const LiveRow& row, bool keeps, int& count) {
  const int warp = threadIdx.x / 32;
  const uint32_t votes = __ballot_sync(0xffffffffu, keeps);
  if (threadIdx.x % 32 == 0) s.kept[warp] = __popc(votes);
  __syncthreads();
  int at = count + __popc(votes & ((1u << (threadIdx.x % 32)) - 1));
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) at += s.kept[w];
    count += s.kept[w];
  }
  if (keeps) s.rows[at] = row;
  __syncthreads();
}

// One warp: the rows of s.rows[0, count) that chunk c sees, counted or written.
template <bool kWrite, int kStep>
__device__ void one_chunk(const Problem& p, const Shared<kStep>& s, int count, int lane, int c) {
  const int warp_lane = threadIdx.x % 32, first = c * p.chunk, end = min(first + p.chunk, p.seqlen_q);
  const int64_t list = p.list(lane, c);
  const TauRange tau = p.ranges[list];
  int32_t* const places = p.places + list * kClasses * p.num_parts + blockIdx.x;
  int at[kClasses];
#pragma unroll
  for (int k = 0; k < kClasses; ++k) at[k] = places[k * p.num_parts];
  __syncwarp();
  LiveRow* const out = p.lists.rows + list * p.lists.capacity;
#pragma unroll 1
  for (int base = 0; base < count; base += 32) {
    const LiveRow row = s.rows[min(base + warp_lane, count - 1)];
    const bool is_live = base + warp_lane < count && row.begin < end && row.end > first;
    const bool is_full = is_live && row.begin <= first && row.end >= end;
    const bool is_plain = is_full && row.u - tau.most >= 1.0f;
    const bool is_fraction = is_full && row.u - tau.least < 1.0f && row.u - tau.most > 0.0f;
    const int kind = !is_live ? kClasses : is_plain ? 0 : is_fraction ? 1 : 2;
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      const uint32_t votes = __ballot_sync(0xffffffffu, kind == k);
      if constexpr (kWrite) {
        const int place = at[k] + __popc(votes & ((1u << warp_lane) - 1));
        if (kind == k && place < p.lists.capacity) out[place] = {row.row, row.begin, min(row.end, end), row.u};
      }
      at[k] += __popc(votes);
    }
  }
  if (warp_lane == 0) {
#pragma unroll
    for (int k = 0; k < kClasses; ++k) places[k * p.num_parts] = at[k];
  }
}

template <bool kWrite, int kStep>
__global__ void __launch_bounds__(kThreads) parts_kernel(const __grid_constant__ Problem p) {
  __shared__ Shared<kStep> s;
  const int lane = blockIdx.y, warp = threadIdx.x / 32;
  if (!kWrite) {
    int32_t* const places = p.places + p.list(lane, 0) * kClasses * p.num_parts + blockIdx.x;
    for (int n = threadIdx.x; n < p.num_chunks * kClasses; n += kThreads) places[int64_t{n} * p.num_parts] = 0;
  }
  const int part_end = min((static_cast<int>(blockIdx.x) + 1) * p.part_rows, p.seqlen_k);
#pragma unroll 1
  for (int first_row = blockIdx.x * p.part_rows; first_row < part_end; first_row += kStep) {
    if (threadIdx.x == 0) s.first_chunk = INT32_MAX, s.last_chunk = -1;
    int count = 0;
    __syncthreads();
    LiveRow own[kStep / kThreads];  // all loads before the first wait
#pragma unroll
    for (int n = 0; n < kStep / kThreads; ++n) {
      const int row = first_row + n * kThreads + threadIdx.x;
      const int64_t from = static_cast<int64_t>(lane) * p.seqlen_k + row;
      own[n] = {row, 0, 0, 0.0f};
      if (row < part_end) {
        own[n] = {row, max(p.far_begin[from], 0), min(p.far_end[from], p.seqlen_q), p.scores[from]};
      }
    }
#pragma unroll
    for (const LiveRow& x : own) {
      if (x.begin < x.end) {
        atomicMin(&s.first_chunk, x.begin / p.chunk);
        atomicMax(&s.last_chunk, (x.end - 1) / p.chunk);
      }
      append(s, x, x.begin < x.end, count);
    }
    const int last_chunk = s.last_chunk;
#pragma unroll 1
    for (int base = s.first_chunk; base <= last_chunk && count > 0; base += kWarps) {
      if (base + warp <= last_chunk) one_chunk<kWrite>(p, s, count, lane, base + warp);
      __syncthreads();
      const int before = count, next = (base + kWarps) * p.chunk;
      count = 0;
#pragma unroll 1
      for (int n = 0; n < before; n += kThreads) {
        const int from = n + threadIdx.x;
        const LiveRow x = s.rows[min(from, before - 1)];
        append(s, x, from < before && x.end > next, count);
      }
    }
  }
}

// A warp per list: the places of every part's rows, class by class, and the mark on queries whose list has no room.
__global__ void __launch_bounds__(kThreads) places_kernel(const __grid_constant__ Problem p) {
  const int64_t list = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (list >= int64_t{p.lanes} * p.num_chunks) return;
  const int warp_lane = threadIdx.x % 32;
  int sum = 0;
#pragma unroll 1
  for (int k = 0; k < kClasses; ++k) {
    int32_t* const places = p.places + (list * kClasses + k) * p.num_parts;
#pragma unroll 1
    for (int base = 0; base < p.num_parts; base += 32) {
      const int part = base + warp_lane, own = part < p.num_parts ? places[part] : 0;
      int upto = own;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, step);
        if (warp_lane >= step) upto += other;
      }
      if (part < p.num_parts) places[part] = sum + upto - own;
      sum += __shfl_sync(0xffffffffu, upto, 31);
    }
    if (warp_lane == 0) {
      if (k < 2) p.lists.classes[list * 2 + k] = min(sum, p.lists.capacity);
      if (k == 2) p.lists.count[list] = min(sum, p.lists.capacity);
    }
  }
  if (sum <= p.lists.capacity) return;
  const int first = static_cast<int>(list % p.num_chunks) * p.chunk;
  float* const tau = p.checked_tau + list / p.num_chunks * p.seqlen_q;
  for (int i = first + warp_lane; i < min(first + p.chunk, p.seqlen_q); i += 32) tau[i] = NAN;
}

int64_t carve(const AttentionFwdParams& params, int chunk, void* workspace, Problem& p) {
  p.lanes = params.batch * params.num_kv_heads, p.seqlen_q = params.seqlen_q, p.seqlen_k = params.seqlen_k;
  p.chunk = chunk, p.num_chunks = static_cast<int32_t>((int64_t{params.seqlen_q} + chunk - 1) / chunk);
  p.step = int64_t{p.lanes} * params.seqlen_k < 256 * kLongStep ? kShortStep : kLongStep;
  const int64_t steps = (int64_t{params.seqlen_k} + p.step - 1) / p.step;
  p.part_rows = static_cast<int32_t>(std::max<int64_t>((steps + kMostParts - 1) / kMostParts, 1) * p.step);
  p.num_parts = static_cast<int32_t>((int64_t{params.seqlen_k} + p.part_rows - 1) / p.part_rows);
  Carver carver(workspace);
  const int64_t lists = int64_t{p.lanes} * p.num_chunks;
  carver.take(p.ranges, lists);
  carver.take(p.places, lists * kClasses * p.num_parts);
  return carver.used_bytes();
}

template <bool kWrite>
void launch_parts(const Problem& p, cudaStream_t stream) {
  const dim3 parts(p.num_parts, p.lanes);
  if (p.step == kLongStep)
    parts_kernel<kWrite, kLongStep><<<parts, kThreads, 0, stream>>>(p);
  else
    parts_kernel<kWrite, kShortStep><<<parts, kThreads, 0, stream>>>(p);
}

}  // namespace

int64_t live_lists_workspace_bytes(const AttentionFwdParams& params, int chunk) {
  Problem problem{};
  return carve(params, chunk, nullptr, problem);
}

void live_lists(const AttentionFwdParams& params, int chunk, const LiveLists& lists, float* tau, void* workspace,
                cudaStream_t stream) {
  assert(params.dtype != DType::kF64 && chunk > 0);
  Problem p{};
  carve(params, chunk, workspace, p);
  p.far_begin = params.far_begin, p.far_end = params.far_end;
  p.scores = static_cast<const float*>(params.scores), p.tau = static_cast<const float*>(params.tau);
  p.lists = lists, p.checked_tau = tau;
  const int64_t num_lists = int64_t{p.lanes} * p.num_chunks;
  if (num_lists == 0) return;
  const auto list_blocks = static_cast<unsigned>((num_lists + kWarps - 1) / kWarps);
  tau_range_kernel<<<list_blocks, kThreads, 0, stream>>>(p);
  launch_parts<false>(p, stream);
  places_kernel<<<list_blocks, kThreads, 0, stream>>>(p);
  launch_parts<true>(p, stream);
  check_cuda(cudaGetLastError(), "live_lists");
}

}  // namespace sparsek::cuda
