// What the backward's main kernels need before: row data, items, zeroed sums. One launch.
#pragma once
#include "kernels/cuda/sm90/attention_bwd/kernel.cuh"

namespace sparsek::cuda::sm90 {

struct PrepareParams {
  const Bits16 *out, *d_out;
  const float *lse, *d_lse, *tau;  // d_lse: null, no gradient
  const int32_t *window_begin, *far_begin, *far_end;
  LiveLists live;
  RowData* rows;
  float *lse2, *delta;             // [batch * num_heads, seqlen_q] in powers of two; <do, out> - dlse
  float *dk_scratch, *dv_scratch;  // zeroed for the rows that are ever selected
  float *h_key, *h_query;          // [lanes, seqlen_k], [lanes, seqlen_q] zeroed; null: no score gradient
  Item* items;                     // the far blocks of every (chunk, lane), then the band tiles
  int32_t* counters;               // two, zeroed
  int64_t o_batch, o_seq, o_head, do_batch, do_seq, do_head;
  int32_t lanes, num_heads, num_kv_heads, seqlen_q, seqlen_k, num_carried, positions_per_step, steps, num_chunks, chunk,
      far_per_chunk, num_items;  // lanes: batch * num_kv_heads
  int32_t row_ctas, zero_ctas;
};

constexpr int kPrepareThreads = 256;

// A CTA per (step, lane).
template <class ShapeType>
__device__ void prepare_rows(const PrepareParams& p, int index) {
  constexpr int kPieces = ShapeType::kPieces;
  const int step = index / p.lanes, lane = index % p.lanes, b = lane / p.num_kv_heads,
            group = p.num_heads / p.num_kv_heads, piece = threadIdx.x % kPieces;
  RowData& data = p.rows[static_cast<int64_t>(lane) * p.steps + step];
#pragma unroll
  for (int n = 0; n < kStep * kPieces / kPrepareThreads; ++n) {
    const int column = threadIdx.x / kPieces + n * (kPrepareThreads / kPieces);
    const int i = step * p.positions_per_step + column / group, head = lane % p.num_kv_heads * group + column % group;
    const bool valid = column < p.positions_per_step * group && i < p.seqlen_q;
    float sum = 0;
    if (valid) {
      const uint4 o = *reinterpret_cast<const uint4*>(p.out + b * p.o_batch + i * p.o_seq + head * p.o_head +
                                                      piece * 8),
                  d = *reinterpret_cast<const uint4*>(p.d_out + b * p.do_batch + i * p.do_seq + head * p.do_head +
                                                      piece * 8);
      const auto product = [](uint32_t x, uint32_t y) {
        const float2 a = ptx::unpack<typename ShapeType::Element>(x), c = ptx::unpack<typename ShapeType::Element>(y);
        return a.x * c.x + a.y * c.y;
      };
      sum = (product(o.x, d.x) + product(o.y, d.y)) + (product(o.z, d.z) + product(o.w, d.w));
    }
#pragma unroll
    for (int bit = kPieces / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (piece == 0) {
      const int64_t row = (static_cast<int64_t>(b) * p.num_heads + head) * p.seqlen_q + i,
                    query = static_cast<int64_t>(lane) * p.seqlen_q + i;
      // A NaN in tau makes its row's gradients NaN.
      const float tau = valid ? p.tau[query] : 0.0f, poison = tau != tau ? tau : 0.0f;
      const float lse2 = valid ? p.lse[row] * 1.44269504088896341f + poison : INFINITY,
                  delta = valid ? sum - (p.d_lse == nullptr ? 0.0f : p.d_lse[row]) : 0.0f;
      if (valid) p.lse2[row] = lse2, p.delta[row] = delta;
      if (valid && p.h_query != nullptr && column % group == 0) p.h_query[query] = poison;
      data.lse2[column] = lse2;
      data.delta[column] = delta;
      data.tau[column] = tau;
      data.window_begin[column] = valid ? p.window_begin[static_cast<int64_t>(b) * p.seqlen_q + i] : INT32_MAX;
    }
  }
}

// A warp per 32 rows of a lane.
template <class ShapeType>
__device__ void prepare_sums(const PrepareParams& p, int index) {
  constexpr int kVectors = ShapeType::kHeadDim / 4;  // of a row
  const int64_t total = static_cast<int64_t>(p.lanes) * p.seqlen_k, base = (index * 8LL + threadIdx.x / 32) * 32;
  const int lane = threadIdx.x & 31;
  const bool selected = base + lane < total && p.far_end[base + lane] > p.far_begin[base + lane];
  if (p.h_key != nullptr && base + lane < total) p.h_key[base + lane] = 0;
  uint32_t votes = __ballot_sync(0xffffffffu, selected);
  while (votes != 0) {
    const int64_t row = base + __ffs(votes) - 1;
    votes &= votes - 1;
#pragma unroll
    for (int n = lane; n < 2 * kVectors; n += 32)
      reinterpret_cast<float4*>((n < kVectors ? p.dk_scratch : p.dv_scratch) +
                                row * ShapeType::kHeadDim)[n % kVectors] = float4{0, 0, 0, 0};
  }
}

// A warp per item.
__device__ inline void prepare_item(const PrepareParams& p, int index) {
  const int lane = threadIdx.x & 31, num_far = p.num_chunks * p.lanes * p.far_per_chunk, seqlen_q = p.seqlen_q;
  if (index >= p.num_items) return;
  const int heads = p.lanes, far_per_chunk = p.far_per_chunk, num_chunks = p.num_chunks, chunk_size = p.chunk,
            live_capacity = p.live.capacity;
  const int32_t *window_begin = p.window_begin, *live_count = p.live.count, *live_classes = p.live.classes;
  const LiveRow* live = p.live.rows;
  Item* const to = p.items + index;
  Item item{0, 0, 0, 0, 0, 0, 0, 0};
  if (index >= num_far) {
    index -= num_far;
    const int head = index % heads, first = index / heads * kBlock;
    if (first >= p.seqlen_k) return;
    item.head = head, item.first = first, item.count = kBlock;
    const int last_row = min(first + kBlock, p.seqlen_k) - 1, from = max(0, first - p.num_carried);
    const int32_t* begin = window_begin + static_cast<int64_t>(head / p.num_kv_heads) * seqlen_q;
    int low = from, high = seqlen_q;  // first query whose window begins after the tile
    while (low < high) {
      const int middle = (low + high) / 2;
      if (begin[middle] <= last_row)
        low = middle + 1;
      else
        high = middle;
    }
    if (low > from) item.step_begin = from / p.positions_per_step, item.step_end = (low - 1) / p.positions_per_step + 1;
  } else {
    const int n = index % far_per_chunk, head = index / far_per_chunk % heads, chunk = index / far_per_chunk / heads;
    const int64_t list = static_cast<int64_t>(head) * num_chunks + chunk;
    const int first = n * kBlock, count = min(kBlock, live_count[list] - first);
    if (count > 0) {
      int begin = INT32_MAX, end = 0, max_begin = 0, min_end = INT32_MAX;
      for (int m = lane; m < count; m += 32) {
        const LiveRow x = live[list * live_capacity + first + m];
        begin = min(begin, x.begin), end = max(end, x.end), max_begin = max(max_begin, x.begin),
        min_end = min(min_end, x.end);
      }
      begin = max(chunk * chunk_size, __reduce_min_sync(0xffffffffu, begin));
      end = min(min((chunk + 1) * chunk_size, seqlen_q), __reduce_max_sync(0xffffffffu, end));
      const int plain = live_classes[list * 2], fractional = live_classes[list * 2 + 1];
      const int mode = first + count <= plain                          ? kFarPlain
                       : first >= plain && first + count <= fractional ? kFarFractional
                                                                       : kFarGeneral;
      item = {head,
              count == kBlock ? mode : kFarGeneral,
              static_cast<int32_t>(list * live_capacity + first),
              count,
              begin / p.positions_per_step,
              (end - 1) / p.positions_per_step + 1,
              __reduce_max_sync(0xffffffffu, max_begin),
              __reduce_min_sync(0xffffffffu, min_end)};
      if (count < kBlock) item.max_begin = INT32_MAX;
    }
  }
  if (lane == 0) *to = item;
}

template <class ShapeType>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  int index = blockIdx.x;
  if (index == 0 && threadIdx.x < 2) p.counters[threadIdx.x] = 0;
  if (index < p.row_ctas) return prepare_rows<ShapeType>(p, index);
  index -= p.row_ctas;
  if (index < p.zero_ctas) return prepare_sums<ShapeType>(p, index);
  prepare_item(p, (index - p.zero_ctas) * 8 + threadIdx.x / 32);
}

}  // namespace sparsek::cuda::sm90
