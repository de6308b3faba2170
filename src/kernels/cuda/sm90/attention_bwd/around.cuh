// What runs before and after the backward's main kernels.
#pragma once
#include "kernels/cuda/sm90/attention_bwd/kernel.cuh"

namespace sparsek::cuda::sm90 {

// --- before: row data, items

// One CTA per (step, head); 16 lanes per row.
__global__ void __launch_bounds__(256)
    bwd_rows_kernel(const bf16* out, const bf16* d_out, const float* lse, const float* d_lse, const float* tau,
                    const int32_t* window_begin, int seqlen_q, int num_heads, int num_kv_heads, int positions_per_step,
                    int steps, int64_t o_batch, int64_t o_seq, int64_t o_head, RowData* rows, float* lse2,
                    float* deltas) {
  const int step = blockIdx.x, kv_head = blockIdx.y, b = kv_head / num_kv_heads, group = num_heads / num_kv_heads;
  const int lane = threadIdx.x & 15;
  RowData& data = rows[static_cast<int64_t>(kv_head) * steps + step];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int column = threadIdx.x / 16 + n * 16;
    const int i = step * positions_per_step + column / group, head = kv_head % num_kv_heads * group + column % group;
    const bool valid = column < positions_per_step * group && i < seqlen_q;
    float sum = 0;
    if (valid) {
      const int64_t at = b * o_batch + i * o_seq + head * o_head + lane * 8;
      const uint4 o = *reinterpret_cast<const uint4*>(out + at), d = *reinterpret_cast<const uint4*>(d_out + at);
      const auto product = [](uint32_t a, uint32_t b) {
        const float2 fa = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(a)),
                     fb = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(b));
        return fa.x * fb.x + fa.y * fb.y;
      };
      sum = (product(o.x, d.x) + product(o.y, d.y)) + (product(o.z, d.z) + product(o.w, d.w));
    }
    for (int bit = 8; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (lane == 0) {
      const int64_t row = (static_cast<int64_t>(b) * num_heads + head) * seqlen_q + i;
      if (valid && lse2 != nullptr)
        lse2[row] = lse[row] * 1.44269504088896341f, deltas[row] = sum - (d_lse == nullptr ? 0.0f : d_lse[row]);
      data.lse2[column] = valid ? lse[row] * 1.44269504088896341f : INFINITY;
      data.delta[column] = valid ? sum - (d_lse == nullptr ? 0.0f : d_lse[row]) : 0.0f;
      data.tau[column] = valid ? tau[static_cast<int64_t>(kv_head) * seqlen_q + i] : 0.0f;
      data.window_begin[column] = valid ? window_begin[static_cast<int64_t>(b) * seqlen_q + i] : INT32_MAX;
    }
  }
}

// Scratch of the rows that are ever selected. One warp per 32 rows of a head.
__global__ void __launch_bounds__(256)
    bwd_zero_kernel(const int32_t* far_begin, const int32_t* far_end, int64_t total, float* dk, float* dv) {
  const int64_t base = (blockIdx.x * 8LL + threadIdx.x / 32) * 32;
  const int lane = threadIdx.x & 31;
  const bool selected = base + lane < total && far_end[base + lane] > far_begin[base + lane];
  uint32_t votes = __ballot_sync(0xffffffffu, selected);
  while (votes != 0) {
    const int64_t row = base + __ffs(votes) - 1;
    votes &= votes - 1;
    reinterpret_cast<float4*>(dk + row * kHeadDim)[lane] = reinterpret_cast<float4*>(dv + row * kHeadDim)[lane] =
        float4{0, 0, 0, 0};
  }
}

// One warp per item: the far blocks of every (chunk, head), then the band tiles of every head.
__global__ void __launch_bounds__(256)
    bwd_items_kernel(const int32_t* window_begin, const LiveRow* live, const int32_t* live_count,
                     const int32_t* live_classes, int heads, int num_kv_heads, int seqlen_q, int seqlen_k,
                     int num_carried, int num_chunks, int chunk_size, int live_capacity, int positions_per_step,
                     int far_per_chunk, Item* items) {
  int index = blockIdx.x * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x & 31, num_far = num_chunks * heads * far_per_chunk;
  Item* const to = items + index;
  Item item{0, 0, 0, 0, 0, 0, 0, 0};
  if (index >= num_far) {
    index -= num_far;
    const int head = index % heads, first = index / heads * kBlock;
    if (first >= seqlen_k) return;
    item.head = head, item.first = first, item.count = kBlock;
    const int last_row = min(first + kBlock, seqlen_k) - 1, from = max(0, first - num_carried);
    const int32_t* begin = window_begin + static_cast<int64_t>(head / num_kv_heads) * seqlen_q;
    int low = from, high = seqlen_q;  // first query whose window begins after the tile
    while (low < high) {
      const int middle = (low + high) / 2;
      if (begin[middle] <= last_row)
        low = middle + 1;
      else
        high = middle;
    }
    if (low > from) item.step_begin = from / positions_per_step, item.step_end = (low - 1) / positions_per_step + 1;
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
              begin / positions_per_step,
              (end - 1) / positions_per_step + 1,
              __reduce_max_sync(0xffffffffu, max_begin),
              __reduce_min_sync(0xffffffffu, min_end)};
      if (count < kBlock) item.max_begin = INT32_MAX;
    }
  }
  if (lane == 0) *to = item;
}

// --- after: scratch to bf16

// dq: one thread per 16 floats of the scratch: 8 columns of two rows.
__global__ void __launch_bounds__(256)
    bwd_dq_kernel(const float* scratch, int seqlen_q, int num_kv_heads, int group, int positions_per_step, int steps,
                  int64_t total, float scale, int64_t q_batch, int64_t q_seq, int64_t q_head, bf16* dq) {
  const int64_t index = blockIdx.x * 256LL + threadIdx.x;
  if (index >= total) return;
  const int j = index & 7, quad = (index >> 4) & 31, half = (index >> 3) & 1;
  const int64_t rest = index >> 9;
  const int step = rest % steps, head = rest / steps, b = head / num_kv_heads;
  const float4* from = reinterpret_cast<const float4*>(scratch) + rest * 2048 + half * 1024 + j * 128 + quad * 4;
  const float4 x[4] = {from[0], from[1], from[2], from[3]};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = (quad >> 3) * 16 + (quad & 7) + 8 * r, i = step * positions_per_step + row / group;
    if (row >= positions_per_step * group || i >= seqlen_q) continue;
    uint32_t y[4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      y[t] = r == 0 ? ptx::pack_bf16(x[t].x * scale, x[t].y * scale) : ptx::pack_bf16(x[t].z * scale, x[t].w * scale);
    *reinterpret_cast<uint4*>(dq + b * q_batch + i * q_seq + (head % num_kv_heads * group + row % group) * q_head +
                              half * 64 + j * 8) = {y[0], y[1], y[2], y[3]};
  }
}

}  // namespace sparsek::cuda::sm90
