// Attention backward, the gradients of keys and values by mma.sync: dk, dv, dk_far, and per key the sum of h over the
// queries at which it is fractional (eq. 10). One CTA = 64 keys, 16 a warp, dK and dV in registers; it walks steps of
// 64 query rows (positions x the group's heads): S^T = K Q^T, dP^T = V dO^T, dV += (P gate)^T dO, dK += dS^T Q.
//
// Items, taken in order: first blocks of 64 far rows of each chunk's list, for the chunk's queries; then 64 key rows
// each as window keys. A far row's gradient adds up over the chunks that list it, in float32 and in the order of the
// chunks: a block waits until all blocks of earlier chunks of its KV head are added, so the bits are the same every
// time. Items in front of an item have begun before it, so the wait ends. Window items add what the far ones left and
// write the results.
#pragma once
#include "kernels/cuda/portable/launch.cuh"
#include "kernels/cuda/portable/matrix.cuh"

namespace sparsek::cuda::portable {

constexpr int kStepRows = tile_shape(Kernel::kKeyGradient).rows;

template <int kHeadDim>
struct KeyShared {
  uint8_t k[kKeys * kHeadDim * 2], v[kKeys * kHeadDim * 2];
  uint8_t q[2][kStepRows * kHeadDim * 2], dout[2][kStepRows * kHeadDim * 2];
  // Of a step's rows.
  float lse2[2][kStepRows], delta[2][kStepRows];
  uint32_t row_value[2][kStepRows];  // tau of a far step, window_begin of a window step: tau(), window_low()
  alignas(16) uint32_t q_offset[kStepRows], dout_offset[kStepRows];  // from the step's first row, in 16 bytes
  uint8_t position[kStepRows];                                       // 255: a row that never is there
  // Of far keys: visible at queries [x, y), score.
  int2 interval[kKeys];
  float u[kKeys];
  // Over the keys of a warp.
  struct {
    int32_t begin_min, begin_max, end_min, end_max;
    float u_min;
  } warp[kThreads / 32];
  const uint8_t *q_rows, *dout_rows;  // of the group's first head
  const uint32_t* row_values;         // tau or window_begin of the KV head's queries
  int64_t query_rows;                 // of lse2 and delta: where the group's first head begins
  uint32_t zero;
  int32_t item, step_end;

  __device__ __forceinline__ const float* tau(int stage) const {
    return reinterpret_cast<const float*>(row_value[stage]);
  }
  __device__ __forceinline__ const int32_t* window_low(int stage) const {
    return reinterpret_cast<const int32_t*>(row_value[stage]);
  }
};

struct KeyItem {
  bool is_far;
  int head, b, kv;
  int chunk;         // far
  int64_t list;      // far: of its first LiveRow
  int first, count;  // window: first key row; how many keys there are
  int step_begin, step_end;

  __device__ KeyItem(const BwdProblem& p, int index) {
    const AttentionFwdParams& f = p.fwd;
    const int lanes = f.batch * f.num_kv_heads, lane = threadIdx.x % 32;
    const int num_far = p.num_chunks * lanes * p.blocks_per_list;
    is_far = index < num_far;
    step_begin = step_end = chunk = 0, list = 0;
    if (is_far) {
      head = index / p.blocks_per_list % lanes, chunk = index / p.blocks_per_list / lanes;
      first = index % p.blocks_per_list * kKeys;
      const int64_t slot = static_cast<int64_t>(head) * p.num_chunks + chunk;
      list = slot * p.live.capacity + first;
      count = min(kKeys, p.live.count[slot] - first);
    } else {
      head = (index - num_far) % lanes, first = (index - num_far) / lanes * kKeys;
      count = min(kKeys, f.seqlen_k - first);
    }
    b = head / f.num_kv_heads, kv = head % f.num_kv_heads;
    if (count <= 0) return;
    int from = 0, to = 0;  // queries
    if (is_far) {
      int begin = INT32_MAX, end = 0;
      for (int n = lane; n < count; n += 32) {
        const int4 x = __ldg(reinterpret_cast<const int4*>(p.live.rows + list + n));
        begin = min(begin, x.y), end = max(end, x.z);
      }
      from = max(chunk * p.chunk, __reduce_min_sync(kAllLanes, begin));
      to = min(min((chunk + 1) * p.chunk, f.seqlen_q), __reduce_max_sync(kAllLanes, end));
    } else {
      // Up to the first query whose window begins behind the keys: 32 places at a time.
      from = max(0, first - f.num_carried);
      const int32_t* const window_begin = f.window_begin + static_cast<int64_t>(b) * f.seqlen_q;
      int low = from, high = f.seqlen_q;
      while (low < high) {
        const int each = (high - low + 31) / 32, i = low + lane * each;
        const bool reaches = i < high && window_begin[i] < first + count;
        const int reaching = __popc(__ballot_sync(kAllLanes, reaches));
        const int start = low;
        if (reaching < 32) high = min(high, start + reaching * each);
        if (reaching > 0) low = start + (reaching - 1) * each + 1;
      }
      to = low;
    }
    if (from < to) step_begin = from / p.positions_per_step, step_end = (to - 1) / p.positions_per_step + 1;
  }
};

template <class T, int kHeadDim>
__device__ __forceinline__ void load_item(KeyShared<kHeadDim>& s, const BwdProblem& p, const KeyItem& item) {
  const AttentionFwdParams& f = p.fwd;
  const bool has_far_keys = item.is_far && f.k_far != nullptr;
  const Strides &k_strides = has_far_keys ? f.k_far_strides : f.k_strides, &v_strides = f.v_strides;
  const Strides& q_strides = has_far_keys ? f.q_far_strides : f.q_strides;
  const T* const k =
      static_cast<const T*>(has_far_keys ? f.k_far : f.k) + item.b * k_strides.batch + item.kv * k_strides.head;
  const T* const v = static_cast<const T*>(f.v) + item.b * v_strides.batch + item.kv * v_strides.head;
  const RowCopy<kHeadDim> copy(threadIdx.x);
  const auto copy_rows = [&](uint8_t* to, const T* from, const Strides& strides) {
    copy.template copy<kKeys>(
        to,
        [&](uint32_t n, uint32_t, uint32_t) {
          const int key = min(static_cast<int>(n), item.count - 1),
                    row = item.is_far ? __ldg(&p.live.rows[item.list + key].row) : item.first + key;
          return reinterpret_cast<const uint8_t*>(from + row * strides.seq);
        },
        [](uint32_t) { return 16u; });
  };
  copy_rows(s.k, k, k_strides);
  copy_rows(s.v, v, v_strides);
  const int thread = threadIdx.x;
  if (thread == 0) {
    const int64_t head = int64_t{item.kv} * p.group;
    s.q_rows = reinterpret_cast<const uint8_t*>(static_cast<const T*>(has_far_keys ? f.q_far : f.q) +
                                                item.b * q_strides.batch + head * q_strides.head);
    s.step_end = item.step_end;
    s.query_rows = (int64_t{item.b} * f.num_heads + head) * f.seqlen_q;
    s.row_values = item.is_far
                       ? static_cast<const uint32_t*>(f.tau) + static_cast<int64_t>(item.head) * f.seqlen_q
                       : reinterpret_cast<const uint32_t*>(f.window_begin) + static_cast<int64_t>(item.b) * f.seqlen_q;
    s.dout_rows = reinterpret_cast<const uint8_t*>(static_cast<const T*>(p.dout) + item.b * p.dout_strides.batch +
                                                   head * p.dout_strides.head);
  }
  if (thread < kStepRows) {
    const int position = divide_row(thread, p.group_inverse), head = thread - position * p.group;
    const bool is_there = position < p.positions_per_step;
    s.position[thread] = static_cast<uint8_t>(is_there ? position : 255);
    const auto offset = [&](const Strides& strides) {
      return is_there ? static_cast<uint32_t>((position * strides.seq + head * strides.head) / 8) : 0;
    };
    s.q_offset[thread] = offset(q_strides), s.dout_offset[thread] = offset(p.dout_strides);
  }
  if (item.is_far && thread % 32 < 16) {
    const int warp = thread / 32, key = warp * 16 + thread % 32;
    int4 x{0, INT32_MAX, 0, 0};  // seen by nobody
    if (key < item.count) x = __ldg(reinterpret_cast<const int4*>(p.live.rows + item.list + key));
    s.interval[key] = {x.y, x.z}, s.u[key] = __int_as_float(x.w);
    constexpr uint32_t kHalf = 0xffffu;
    float u_min = key < item.count ? __int_as_float(x.w) : INFINITY;
#pragma unroll
    for (int step = 1; step < 16; step *= 2) u_min = fminf(u_min, __shfl_xor_sync(kHalf, u_min, step));
    s.warp[warp] = {__reduce_min_sync(kHalf, x.y), __reduce_max_sync(kHalf, x.y), __reduce_min_sync(kHalf, x.z),
                    __reduce_max_sync(kHalf, x.z), u_min};
  }
}

// The rows of a step, and what belongs to them.
template <int kHeadDim>
__device__ __forceinline__ void load_step(KeyShared<kHeadDim>& s, const BwdProblem& p, bool is_far, int step,
                                          int stage) {
  const AttentionFwdParams& f = p.fwd;
  const uint32_t thread = hidden(threadIdx.x, s.zero);
  const int first = step * p.positions_per_step, positions = min(p.positions_per_step, f.seqlen_q - first),
            rows = positions * p.group;
  const RowCopy<kHeadDim> copy(thread);
  const auto copy_rows = [&](uint8_t* to, const uint8_t* from, const uint32_t* offsets) {
    uint4 four{};
    const auto at = [&](uint32_t, uint32_t pass, uint32_t j) {
      if (j == 0) four = *reinterpret_cast<const uint4*>(offsets + copy.first_row + pass * copy.kPass);
      return from + uint64_t{j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w} * 16;
    };
    if (rows == kStepRows)
      copy.template copy<kStepRows>(to, at, [](uint32_t) { return 16u; });
    else  // rows that are not there lie at the first one's place or behind the last position: not read
      copy.template copy<kStepRows>(to, at, [&](uint32_t row) { return static_cast<int>(row) < rows ? 16u : 0u; });
  };
  const bool has_far_queries = is_far && f.q_far != nullptr;
  copy_rows(s.q[stage], s.q_rows + first * (has_far_queries ? f.q_far_strides : f.q_strides).seq * 2, s.q_offset);
  copy_rows(s.dout[stage], s.dout_rows + first * p.dout_strides.seq * 2, s.dout_offset);
  const int row = static_cast<int>(thread % kStepRows), position = s.position[row];
  const bool valid = row < rows;
  if (thread < kStepRows) {
    const int64_t at = s.query_rows + static_cast<int64_t>(row - position * p.group) * f.seqlen_q + first + position;
    if (valid) {
      ptx::copy_async_4(ptx::shared_address(&s.lse2[stage][row]), p.lse2 + at);
      ptx::copy_async_4(ptx::shared_address(&s.delta[stage][row]), p.delta + at);
    } else {
      s.lse2[stage][row] = INFINITY, s.delta[stage][row] = 0;
    }
  } else {
    if (valid)
      ptx::copy_async_4(ptx::shared_address(&s.row_value[stage][row]), s.row_values + first + position);
    else
      s.row_value[stage][row] = is_far ? 0 : INT32_MAX;
  }
  ptx::copy_async_commit();
}

template <class T, int kHeadDim>
struct KeyGradient {
  KeyShared<kHeadDim>& s;
  const BwdProblem& p;
  float dk[1][kHeadDim / 8][4], dv[1][kHeadDim / 8][4];
  float h[2];  // of keys lane / 4 and 8 more

  // first_key: the warp's first key row where the item is of the window. is_gated: weights below 1 matter.
  __device__ __forceinline__ void step(int step, int stage, bool is_far, int first_key, bool is_gated) {
    const uint32_t thread = hidden(threadIdx.x, s.zero), lane = thread % 32, warp = thread / 32;
    const int first = step * p.positions_per_step, last = min(first + p.positions_per_step, p.fwd.seqlen_q) - 1,
              last_row = (last - first) * p.group;
    bool masks, gates = false;
    if (is_far) {
      const auto& keys = s.warp[warp];
      if (keys.begin_min > last || keys.end_max <= first) return;
      masks = keys.begin_max > first || keys.end_min <= last;
      gates = is_gated && (masks || !(keys.u_min - s.tau(stage)[last_row] >= 1.0f));
    } else {
      const int low = first_key - p.fwd.num_carried;
      if (low > last || first_key + 15 < s.window_low(stage)[0]) return;
      masks = low + 15 > first || first_key < s.window_low(stage)[last_row];
    }
    const uint32_t key0 = warp * 16 + lane / 4, column0 = lane % 4 * 2;
    float x[1][8][4], dp[1][8][4];
    clear(x);
    multiply_rows<T, kHeadDim, 1>(x, Fragments<kHeadDim>::rows(s.k, lane), warp,
                                  Fragments<kHeadDim>::columns(s.q[stage], lane));
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 lse2 = *reinterpret_cast<const float2*>(&s.lse2[stage][8 * n + column0]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        x[0][n][2 * r] = ptx::exp2_approx(x[0][n][2 * r] * p.scale_log2 - lse2.x);
        x[0][n][2 * r + 1] = ptx::exp2_approx(x[0][n][2 * r + 1] * p.scale_log2 - lse2.y);
      }
    }
    clear(dp);
    multiply_rows<T, kHeadDim, 1>(dp, Fragments<kHeadDim>::rows(s.v, lane), warp,
                                  Fragments<kHeadDim>::columns(s.dout[stage], lane));
    if (masks) {
      if (is_far)
        mask_far(x[0], dp[0], first, key0, column0);
      else
        mask_window(x[0], dp[0], stage, first_key + static_cast<int>(lane / 4), first, column0);
    }
    uint32_t weights[1][4][4], ds[1][4][4];
    if (gates) {
      pack_all<true>(x[0], dp[0], weights[0], ds[0], stage, key0, column0);
    } else {
      pack_all<false>(x[0], dp[0], weights[0], ds[0], stage, key0, column0);
    }
    multiply_onto<T, kHeadDim, 1>(dv, weights, Fragments<kHeadDim>::rows(s.dout[stage], lane));
    multiply_onto<T, kHeadDim, 1>(dk, ds, Fragments<kHeadDim>::rows(s.q[stage], lane));
  }
  // dP too: V of a row that nobody sees may hold anything.
  __device__ __forceinline__ void mask_far(float (&x)[8][4], float (&dp)[8][4], int first, uint32_t key0,
                                           uint32_t column0) const {
    const int2 keys[2] = {s.interval[key0], s.interval[key0 + 8]};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int i = first + s.position[8 * n + column0 + c];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (i < keys[r].x || i >= keys[r].y) x[n][2 * r + c] = dp[n][2 * r + c] = 0;
        }
      }
    }
  }
  __device__ __forceinline__ void mask_window(float (&x)[8][4], float (&dp)[8][4], int stage, int key, int first,
                                              uint32_t column0) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int low = s.window_low(stage)[8 * n + column0 + c],
                  high = p.fwd.num_carried + first + s.position[8 * n + column0 + c];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (key + 8 * r < low || key + 8 * r > high) x[n][2 * r + c] = dp[n][2 * r + c] = 0;
        }
      }
    }
  }
  // From P and dP to P times the gate and dS, and h.
  template <bool kGates>
  __device__ __forceinline__ void pack_all(const float (&x)[8][4], const float (&dp)[8][4], uint32_t (&weights)[4][4],
                                           uint32_t (&ds)[4][4], int stage, uint32_t key0, uint32_t column0) {
    const bool is_soft = p.fwd.gate == Gate::kSoft;
    const float u[2] = {kGates ? s.u[key0] : 0, kGates ? s.u[key0 + 8] : 0};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(&s.delta[stage][8 * n + column0]);
      float2 tau{};
      if (kGates) tau = *reinterpret_cast<const float2*>(&s.tau(stage)[8 * n + column0]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float weight[2] = {x[n][2 * r], x[n][2 * r + 1]}, gradient[2] = {dp[n][2 * r], dp[n][2 * r + 1]};
        if (kGates) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float g = u[r] - (c == 0 ? tau.x : tau.y);
            if (g > 0 && g < 1) h[r] += weight[c] * gradient[c];
            const float factor = is_soft ? __saturatef(g) : 1.0f;
            weight[c] *= factor, gradient[c] *= factor;
          }
        }
        weights[n / 2][n % 2 * 2 + r] = ptx::pack<T>(weight[0], weight[1]);
        ds[n / 2][n % 2 * 2 + r] =
            ptx::pack<T>(x[n][2 * r] * (gradient[0] - delta.x), x[n][2 * r + 1] * (gradient[1] - delta.y));
      }
    }
  }

  // Adds a block's gradients to those of earlier chunks.
  __device__ __forceinline__ void add(const KeyItem& item) {
    const int thread = threadIdx.x, lane = thread % 32;
    if (thread == 0) {
      const int before = p.blocks_before[static_cast<int64_t>(item.head) * (p.num_chunks + 1) + item.chunk];
      while (ptx::load_acquire(p.blocks_done + item.head) < before) __nanosleep(64);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      h[r] += __shfl_xor_sync(kAllLanes, h[r], 1);
      h[r] += __shfl_xor_sync(kAllLanes, h[r], 2);
      const int key = thread / 32 * 16 + lane / 4 + 8 * r;
      if (key >= item.count) continue;
      const int64_t row = static_cast<int64_t>(item.head) * p.fwd.seqlen_k + __ldg(&p.live.rows[item.list + key].row);
      if (lane % 4 == 0 && p.h_key != nullptr) __stcg(p.h_key + row, __ldcg(p.h_key + row) + h[r]);
      add_row(p.dk_sum + row * kHeadDim, dk[0], r, lane);
      add_row(p.dv_sum + row * kHeadDim, dv[0], r, lane);
    }
    __syncthreads();
    if (thread == 0) {
      __threadfence();
      atomicAdd(p.blocks_done + item.head, 1);
    }
  }
  __device__ __forceinline__ void add_row(float* row, const float (&d)[kHeadDim / 8][4], int r, int lane) const {
    float2* const at = reinterpret_cast<float2*>(row) + lane % 4;
#pragma unroll
    for (int from = 0; from < kHeadDim / 8; from += 8) {
      float2 sum[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[n] = __ldcg(at + 4 * (from + n));
#pragma unroll
      for (int n = 0; n < 8; ++n)
        __stcg(at + 4 * (from + n), {sum[n].x + d[from + n][2 * r], sum[n].y + d[from + n][2 * r + 1]});
    }
  }

  // The results of a window item's rows, with what the far items left.
  __device__ __forceinline__ void write(const KeyItem& item) {
    const AttentionFwdParams& f = p.fwd;
    const int thread = threadIdx.x, lane = thread % 32, warp_key = thread / 32 * 16;
    const bool has_far_rotary = f.k_far != nullptr;
    const int64_t lane_rows = static_cast<int64_t>(item.head) * f.seqlen_k;
    bool is_far[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = warp_key + lane / 4 + 8 * r;
      is_far[r] =
          key < item.count && f.far_end[lane_rows + item.first + key] > f.far_begin[lane_rows + item.first + key];
    }
    if (__syncthreads_or(is_far[0] || is_far[1])) {
      if (thread == 0) {
        const int all = p.blocks_before[static_cast<int64_t>(item.head) * (p.num_chunks + 1) + p.num_chunks];
        while (ptx::load_acquire(p.blocks_done + item.head) < all) __nanosleep(64);
      }
      __syncthreads();
    }
    const auto add_far = [&](float(&d)[kHeadDim / 8][4], const float* sums) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!is_far[r]) continue;
        const float2* const at =
            reinterpret_cast<const float2*>(sums + (lane_rows + item.first + warp_key + lane / 4 + 8 * r) * kHeadDim) +
            lane % 4;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float2 x = __ldcg(at + 4 * n);
          d[n][2 * r] += x.x, d[n][2 * r + 1] += x.y;
        }
      }
    };
    const auto store = [&](const float(&d)[kHeadDim / 8][4], float scale, uint8_t* tile, void* tensor) {
      store_rows<T, kHeadDim>(d, scale, scale, tile, warp_key, lane, [&](int r) -> T* {
        if (warp_key + r >= item.count) return nullptr;
        const int64_t row = static_cast<int64_t>(item.b) * f.seqlen_k + item.first + warp_key + r;
        return static_cast<T*>(tensor) + (row * f.num_kv_heads + item.kv) * kHeadDim;
      });
    };
    // A warp's rows of s.k and s.v are read by that warp alone.
    add_far(dv[0], p.dv_sum);
    store(dv[0], 1.0f, s.v, p.dv);
    if (!has_far_rotary) add_far(dk[0], p.dk_sum);
    store(dk[0], p.scale, s.k, p.dk);
    if (has_far_rotary) {
      clear(dk);
      add_far(dk[0], p.dk_sum);
      store(dk[0], p.scale, s.k, p.dk_far);
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, ctas_per_multiprocessor(kHeadDim))
    attention_dkv_kernel(const __grid_constant__ BwdProblem p) {
  extern __shared__ __align__(256) uint8_t memory[];
  auto& s = *reinterpret_cast<KeyShared<kHeadDim>*>(memory);
  if (threadIdx.x == 0) s.item = atomicAdd(p.next_item, 1), s.zero = 0;
  __syncthreads();
  KeyGradient<T, kHeadDim> keys{s, p};
  {
    const KeyItem item(p, s.item);
    if (item.count <= 0) return;
    load_item<T>(s, p, item);
    __syncthreads();
    const bool is_gated = p.fwd.gate == Gate::kSoft || p.h_key != nullptr;
    const int first_key = item.first + static_cast<int>(threadIdx.x / 32) * 16;
    clear(keys.dk), clear(keys.dv);
    keys.h[0] = keys.h[1] = 0;
    int step = item.step_begin, stage = 0;
    if (step < s.step_end) load_step(s, p, item.is_far, step, 0);
#pragma unroll 1
    for (; step < s.step_end; ++step, stage ^= 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // this step is there, the other buffers read
      if (step + 1 < s.step_end) load_step(s, p, item.is_far, step + 1, stage ^ 1);
      keys.step(step, stage, item.is_far, first_key, is_gated);
    }
  }
  ptx::copy_async_wait<0>();
  const KeyItem item(p, static_cast<int>(hidden(static_cast<uint32_t>(s.item), s.zero)));
  if (item.is_far)
    keys.add(item);
  else
    keys.write(item);
}

template <class T>
void launch_key_gradient(const BwdProblem& problem, cudaStream_t stream) {
  const AttentionFwdParams& fwd = problem.fwd;
  const int64_t lanes = int64_t{fwd.batch} * fwd.num_kv_heads,
                far = int64_t{problem.num_chunks} * problem.blocks_per_list,
                window = (int64_t{fwd.seqlen_k} + kKeys - 1) / kKeys;
  if (fwd.head_dim == 128)
    launch<KeyShared<128>>(attention_dkv_kernel<T, 128>, lanes * (far + window), problem, stream);
  else
    launch<KeyShared<64>>(attention_dkv_kernel<T, 64>, lanes * (far + window), problem, stream);
}

}  // namespace sparsek::cuda::portable
