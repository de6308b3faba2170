// See chunk_visibility.h. Plain loops: O(rows) integers per KV head, beside O(chunk * (s + w + k)) multiplications in
// attention.
#include "kernels/cpu/select/chunk_visibility.h"

#include <algorithm>
#include <cassert>

namespace sparsek::cpu {
namespace {

// Where the new state's sinks, ring and slots lie among the chunk's rows (before batch and head offsets).
struct NewState {
  const ChunkVisibilityParams& p;
  int64_t length;

  int64_t row_of_position(int64_t position) const {  // position >= length - window_size
    return p.topk + p.num_sinks + p.window_size + (position - length);
  }
  int64_t sink(int64_t j) const { return j >= length && j < length + p.chunk ? row_of_position(j) : p.topk + j; }
  // Ring row r holds the last position below length + chunk that is r modulo window_size.
  int64_t ring(int64_t r) const {
    const int64_t last = length + p.chunk - 1;
    const int64_t back = ((last - r) % p.window_size + p.window_size) % p.window_size;
    return row_of_position(last - back);
  }
  int64_t slot(int32_t source) const {
    if (source < 0) return 0;
    return source < p.topk ? source : p.topk + p.num_sinks + (source - p.topk);
  }
};

// Window begins and sinks: the same for every KV head.
void fill_positions(const ChunkVisibilityParams& p, int64_t b) {
  const int64_t length = p.lengths[b];
  const int64_t ring_row = p.topk + p.num_sinks;
  for (int64_t i = 0; i < p.chunk; ++i) {
    const int64_t first = std::max<int64_t>(0, length + i - p.window_size + 1);
    p.window_begin[b * p.chunk + i] = static_cast<int32_t>(ring_row + p.window_size + (first - length));
  }
  bool* is_sink = p.is_sink + b * (ring_row + p.window_size + p.chunk);
  for (int64_t row = 0; row < ring_row + p.window_size + p.chunk; ++row) {
    const int64_t position = row - ring_row + length - p.window_size;
    is_sink[row] = row >= ring_row ? position < p.num_sinks : row >= p.topk;
  }
}

void fill_rows(const ChunkVisibilityParams& p, int64_t b, int64_t h) {
  const int64_t length = p.lengths[b], bh = b * p.num_kv_heads + h;
  const int64_t ring_row = p.topk + p.num_sinks, num_rows = ring_row + p.window_size + p.chunk;
  int32_t* far_begin = p.far_begin + bh * num_rows;
  int32_t* far_end = p.far_end + bh * num_rows;
  int32_t* frac_begin = p.frac_begin + bh * (p.pool_capacity + num_rows);
  int32_t* frac_end = p.frac_end + bh * (p.pool_capacity + num_rows);
  std::copy_n(p.pool_frac_begin + bh * p.pool_capacity, p.pool_capacity, frac_begin);
  std::copy_n(p.pool_frac_end + bh * p.pool_capacity, p.pool_capacity, frac_end);
  frac_begin += p.pool_capacity;
  frac_end += p.pool_capacity;

  for (int64_t s = 0; s < p.topk; ++s) {
    far_begin[s] = 0;
    far_end[s] = p.slot_expiry[bh * p.topk + s];
    frac_begin[s] = p.slot_frac_begin[bh * p.topk + s];
    frac_end[s] = p.slot_frac_end[bh * p.topk + s];
  }
  for (int64_t j = 0; j < p.num_sinks; ++j) {  // a sink still inside the window is read from its ring row, below
    const int64_t row = p.topk + j;
    far_begin[row] = 0;
    far_end[row] = j + p.window_size <= length ? p.chunk : 0;
    frac_begin[row] = frac_end[row] = 0;
  }
  for (int64_t t = 0; t < p.window_size + p.chunk; ++t) {
    const int64_t row = ring_row + t, position = length + t - p.window_size;
    const int32_t begin = static_cast<int32_t>(std::min<int64_t>(t, p.chunk));
    far_begin[row] = far_end[row] = frac_begin[row] = frac_end[row] = begin;
    if (t >= p.chunk || position < 0) continue;
    if (position < p.num_sinks) {
      // At t = 0 the carried row of position length - window_size already serves.
      if (position + p.window_size > length) far_end[row] = p.chunk;
      continue;
    }
    far_end[row] = p.arrival_expiry[bh * p.chunk + t];
    frac_begin[row] = p.arrival_frac_begin[bh * p.chunk + t];
    frac_end[row] = p.arrival_frac_end[bh * p.chunk + t];
  }
}

void fill_sources(const ChunkVisibilityParams& p, int64_t b, int64_t h) {
  const int64_t length = p.lengths[b], bh = b * p.num_kv_heads + h;
  const int64_t num_state_rows = p.num_sinks + p.window_size + p.topk, num_rows = num_state_rows + p.chunk;
  int64_t* carried = p.carried_source + b * num_state_rows * p.num_kv_heads + h;
  const auto carry = [&](int64_t state_row) {
    *carried = bh * num_state_rows + state_row;
    carried += p.num_kv_heads;
  };
  for (int64_t s = 0; s < p.topk; ++s) carry(p.num_sinks + p.window_size + s);
  for (int64_t j = 0; j < p.num_sinks; ++j) carry(j);
  for (int64_t r = 0; r < p.window_size; ++r) carry(p.num_sinks + (length + r) % p.window_size);

  const NewState from{p, length};
  int64_t* source = p.state_source + bh * num_state_rows;
  const auto keep = [&](int64_t row) { *source++ = (b * num_rows + row) * p.num_kv_heads + h; };
  for (int64_t j = 0; j < p.num_sinks; ++j) keep(from.sink(j));
  for (int64_t r = 0; r < p.window_size; ++r) keep(from.ring(r));
  for (int64_t s = 0; s < p.topk; ++s) keep(from.slot(p.new_slot_source[bh * p.topk + s]));
}

}  // namespace

void chunk_visibility(const ChunkVisibilityParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    assert(p.lengths[b] >= 0);
    fill_positions(p, b);
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      fill_rows(p, b, h);
      fill_sources(p, b, h);
    }
  }
}

void window_rows(const WindowRowsParams& p) {
  if (p.lengths != nullptr) {
    const int64_t num_rows = int64_t{p.num_sinks} + p.window_size + p.seqlen;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t length = p.lengths[b];
      int32_t* far_begin = p.far_begin + b * num_rows;
      int32_t* far_end = p.far_end + b * num_rows;
      for (int64_t i = 0; i < p.seqlen; ++i) {
        const int64_t first = std::max<int64_t>(0, length + i - p.window_size + 1);
        p.window_begin[b * p.seqlen + i] = static_cast<int32_t>(p.num_sinks + p.window_size + (first - length));
      }
      for (int64_t j = 0; j < p.num_sinks; ++j) {
        far_begin[j] = 0;
        far_end[j] = j + p.window_size <= length ? p.seqlen : 0;
      }
      for (int64_t t = 0; t < p.window_size + p.seqlen; ++t) {
        const int64_t position = length + t - p.window_size;
        const bool leaves_here = t > 0 && t < p.seqlen && position >= 0 && position < p.num_sinks;
        far_begin[p.num_sinks + t] = static_cast<int32_t>(std::min<int64_t>(t, p.seqlen));
        far_end[p.num_sinks + t] = leaves_here ? p.seqlen : far_begin[p.num_sinks + t];
      }
    }
    return;
  }
  const int64_t half = (p.window_size + 1) / 2;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t whole[2] = {0, p.seqlen};
    const int32_t* starts = p.cu_seqlens != nullptr ? p.cu_seqlens : whole;
    const int64_t num_documents = p.cu_seqlens != nullptr ? p.num_documents : 1;
    for (int64_t d = 0; d < num_documents; ++d) {
      const int64_t start = starts[d], end = starts[d + 1];
      for (int64_t j = start; j < end; ++j) {
        const int64_t leaves = std::min(j + p.window_size, end), at = b * p.seqlen + j;
        p.window_begin[at] = static_cast<int32_t>(std::max(start, j - p.window_size + 1));
        p.far_begin[at] = static_cast<int32_t>(leaves);
        p.far_end[at] = static_cast<int32_t>(j - start < p.num_sinks ? end : leaves);
        p.num_queries[at] = static_cast<int32_t>(std::max<int64_t>(0, leaves - (j + half)));
      }
    }
  }
}

}  // namespace sparsek::cpu
