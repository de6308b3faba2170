// Rows of a chunk, by what they mean: at every query, exactly the window, the sinks and the selected keys are visible,
// each once; and following the sources, every row of the carried and of the new state holds the key it must.
#include "kernels/cpu/select/chunk_visibility.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace sparsek::cpu {
namespace {

struct Sizes {
  int32_t chunk, topk, window_size, num_sinks, pool_capacity;
};
constexpr int32_t kHeads = 2;
constexpr int64_t kSlot = 1 << 20;  // label of the key in old slot s: kSlot + s

struct Chunk {
  Sizes sizes;
  std::vector<int64_t> lengths;
  std::vector<int32_t> slot_expiry, slot_frac_begin, slot_frac_end, pool_frac_begin, pool_frac_end, arrival_expiry,
      arrival_frac_begin, arrival_frac_end, new_slot_source;
  std::vector<int32_t> window_begin, far_begin, far_end, frac_begin, frac_end;
  std::vector<int64_t> carried_source, state_source;
  std::vector<char> is_sink;

  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t carried() const { return sizes.topk + sizes.num_sinks + sizes.window_size; }
  int64_t rows() const { return carried() + sizes.chunk; }
};

// A selection of random intervals; a key that arrives before it is a candidate has none.
Chunk run(const Sizes& sizes, std::vector<int64_t> lengths, std::mt19937& engine) {
  Chunk c;
  c.sizes = sizes;
  c.lengths = std::move(lengths);
  const auto pick = [&](int64_t low, int64_t high) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(engine));
  };
  for (int64_t b = 0; b < c.batch(); ++b) {
    for (int h = 0; h < kHeads; ++h) {
      for (int s = 0; s < sizes.topk; ++s) {
        const int32_t expiry = pick(0, sizes.chunk), begin = pick(0, expiry);
        c.slot_expiry.push_back(expiry);
        c.slot_frac_begin.push_back(begin);
        c.slot_frac_end.push_back(pick(begin, sizes.chunk));
        c.new_slot_source.push_back(pick(-1, sizes.topk + sizes.chunk - 1));
      }
      for (int r = 0; r < sizes.pool_capacity; ++r) {
        c.pool_frac_begin.push_back(pick(0, sizes.chunk));
        c.pool_frac_end.push_back(pick(0, sizes.chunk));
      }
      for (int t = 0; t < sizes.chunk; ++t) {
        const bool candidate = c.lengths[b] + t - sizes.window_size >= sizes.num_sinks;
        c.arrival_expiry.push_back(candidate ? pick(t, sizes.chunk) : t);
        c.arrival_frac_begin.push_back(candidate ? pick(t, sizes.chunk) : t);
        c.arrival_frac_end.push_back(candidate ? pick(t, sizes.chunk) : t);
      }
    }
  }
  const int64_t heads = c.batch() * kHeads;
  c.window_begin.resize(c.batch() * sizes.chunk, -7);
  c.far_begin.resize(heads * c.rows(), -7);
  c.far_end.resize(heads * c.rows(), -7);
  c.frac_begin.resize(heads * (sizes.pool_capacity + c.rows()), -7);
  c.frac_end.resize(heads * (sizes.pool_capacity + c.rows()), -7);
  c.is_sink.resize(c.batch() * c.rows(), 7);
  c.carried_source.resize(heads * c.carried(), -7);
  c.state_source.resize(heads * c.carried(), -7);
  ChunkVisibilityParams params{};
  params.lengths = c.lengths.data();
  params.slot_expiry = c.slot_expiry.data();
  params.slot_frac_begin = c.slot_frac_begin.data();
  params.slot_frac_end = c.slot_frac_end.data();
  params.pool_frac_begin = c.pool_frac_begin.data();
  params.pool_frac_end = c.pool_frac_end.data();
  params.arrival_expiry = c.arrival_expiry.data();
  params.arrival_frac_begin = c.arrival_frac_begin.data();
  params.arrival_frac_end = c.arrival_frac_end.data();
  params.new_slot_source = c.new_slot_source.data();
  params.window_begin = c.window_begin.data();
  params.far_begin = c.far_begin.data();
  params.far_end = c.far_end.data();
  params.frac_begin = c.frac_begin.data();
  params.frac_end = c.frac_end.data();
  params.is_sink = reinterpret_cast<bool*>(c.is_sink.data());
  params.carried_source = c.carried_source.data();
  params.state_source = c.state_source.data();
  params.batch = static_cast<int32_t>(c.batch());
  params.chunk = sizes.chunk;
  params.num_kv_heads = kHeads;
  params.topk = sizes.topk;
  params.window_size = sizes.window_size;
  params.num_sinks = sizes.num_sinks;
  params.pool_capacity = sizes.pool_capacity;
  chunk_visibility(params);
  return c;
}

// The keys the rows stand for, by following carried_source through a state whose rows are labelled.
std::vector<int64_t> labels_of_rows(const Chunk& c, int64_t b, int64_t bh) {
  const Sizes& s = c.sizes;
  const int64_t length = c.lengths[b];
  std::vector<int64_t> state(s.num_sinks + s.window_size + s.topk, -1);
  for (int64_t j = 0; j < std::min<int64_t>(s.num_sinks, length); ++j) state[j] = j;
  for (int64_t p = std::max<int64_t>(0, length - s.window_size); p < length; ++p) {
    state[s.num_sinks + p % s.window_size] = p;
  }
  for (int64_t slot = 0; slot < s.topk; ++slot) state[s.num_sinks + s.window_size + slot] = kSlot + slot;
  std::vector<int64_t> labels;
  for (int64_t r = 0; r < c.carried(); ++r) {
    labels.push_back(state.at(c.carried_source[(b * c.carried() + r) * kHeads + bh % kHeads] - bh * c.carried()));
  }
  for (int64_t t = 0; t < s.chunk; ++t) labels.push_back(length + t);
  return labels;
}

void check_visible(const Chunk& c, int64_t b, int64_t bh, const std::vector<int64_t>& labels) {
  const Sizes& s = c.sizes;
  const int64_t length = c.lengths[b];
  const int32_t* far_begin = &c.far_begin[bh * c.rows()];
  const int32_t* far_end = &c.far_end[bh * c.rows()];
  EXPECT_TRUE(std::is_sorted(far_begin, far_begin + c.rows()));
  for (int64_t i = 0; i < s.chunk; ++i) {
    std::map<int64_t, int> seen, wanted;
    for (int64_t r = c.window_begin[b * s.chunk + i]; r <= c.carried() + i; ++r) ++seen[labels.at(r)];
    for (int64_t r = 0; r < c.rows(); ++r) {
      if (far_begin[r] > i || i >= far_end[r]) continue;
      ++seen[labels[r]];
      EXPECT_EQ(bool(c.is_sink[b * c.rows() + r]), labels[r] < s.num_sinks) << "row " << r << " query " << i;
    }
    const int64_t now = length + i;
    for (int64_t p = std::max<int64_t>(0, now - s.window_size + 1); p <= now; ++p) wanted[p] = 1;
    for (int64_t j = 0; j < std::min<int64_t>(s.num_sinks, now); ++j) wanted[j] = 1;
    for (int64_t slot = 0; slot < s.topk; ++slot) {
      if (i < c.slot_expiry[bh * s.topk + slot]) wanted[kSlot + slot] = 1;
    }
    for (int64_t t = 0; t <= i; ++t) {
      if (i < c.arrival_expiry[bh * s.chunk + t]) wanted[length + t - s.window_size] = 1;
    }
    EXPECT_EQ(seen, wanted) << "query " << i << " length " << length;
  }
}

void check_new_state(const Chunk& c, int64_t b, int64_t bh, const std::vector<int64_t>& labels) {
  const Sizes& s = c.sizes;
  const int64_t length = c.lengths[b], end = length + s.chunk;
  const auto label = [&](int64_t state_row) {
    const int64_t source = c.state_source[bh * c.carried() + state_row] - b * c.rows() * kHeads;
    EXPECT_EQ(source % kHeads, bh % kHeads);
    return labels.at(source / kHeads);
  };
  for (int64_t j = 0; j < std::min<int64_t>(s.num_sinks, end); ++j) EXPECT_EQ(label(j), j);
  for (int64_t p = std::max<int64_t>(0, end - s.window_size); p < end; ++p) {
    EXPECT_EQ(label(s.num_sinks + p % s.window_size), p);
  }
  for (int64_t slot = 0; slot < s.topk; ++slot) {
    const int64_t source = c.new_slot_source[bh * s.topk + slot];
    const int64_t position = length + source - s.topk - s.window_size;
    if (source < 0 || (source >= s.topk && position < 0)) continue;
    EXPECT_EQ(label(s.num_sinks + s.window_size + slot), source < s.topk ? kSlot + source : position);
  }
}

void check_score_rows(const Chunk& c, int64_t bh) {
  const Sizes& s = c.sizes;
  const int32_t* begin = &c.frac_begin[bh * (s.pool_capacity + c.rows())];
  const int32_t* end = &c.frac_end[bh * (s.pool_capacity + c.rows())];
  for (int64_t r = 0; r < s.pool_capacity + c.rows(); ++r) {
    int64_t wanted_begin = 0, wanted_end = 0;
    const int64_t slot = r - s.pool_capacity, arrival = slot - s.topk - s.num_sinks;
    if (slot < 0) {
      wanted_begin = c.pool_frac_begin[bh * s.pool_capacity + r];
      wanted_end = c.pool_frac_end[bh * s.pool_capacity + r];
    } else if (slot < s.topk) {
      wanted_begin = c.slot_frac_begin[bh * s.topk + slot];
      wanted_end = c.slot_frac_end[bh * s.topk + slot];
    } else if (arrival >= 0 && arrival < s.chunk) {
      wanted_begin = c.arrival_frac_begin[bh * s.chunk + arrival];
      wanted_end = c.arrival_frac_end[bh * s.chunk + arrival];
    }
    if (wanted_begin < wanted_end) {
      EXPECT_EQ(begin[r], wanted_begin);
      EXPECT_EQ(end[r], wanted_end);
    } else {
      EXPECT_LE(end[r], begin[r]) << "score row " << r;
    }
  }
}

TEST(ChunkVisibility, RowsMeanTheKeysTheyMust) {
  std::mt19937 engine(7);
  for (const Sizes& sizes : {Sizes{5, 3, 4, 0, 6}, Sizes{1, 2, 4, 3, 3}, Sizes{12, 3, 4, 2, 5}, Sizes{9, 1, 1, 5, 2},
                             Sizes{3, 4, 20, 6, 9}, Sizes{30, 2, 3, 7, 4}}) {
    for (int64_t length : {0, 1, 2, 3, 4, 5, 6, 7, 11, 19, 20, 23, 26, 27, 1000}) {
      const Chunk c = run(sizes, {length, length / 2 + 3, 0}, engine);
      for (int64_t bh = 0; bh < c.batch() * kHeads; ++bh) {
        const int64_t b = bh / kHeads;
        SCOPED_TRACE(testing::Message() << "chunk " << sizes.chunk << " window " << sizes.window_size << " sinks "
                                        << sizes.num_sinks << " length " << c.lengths[b]);
        const std::vector<int64_t> labels = labels_of_rows(c, b, bh);
        check_visible(c, b, bh, labels);
        check_new_state(c, b, bh, labels);
        check_score_rows(c, bh);
      }
    }
  }
}

TEST(WindowRows, BehindAStateShowWindowAndSinksOnce) {
  for (int32_t window_size : {1, 3, 8}) {
    for (int32_t num_sinks : {0, 2, 9}) {
      for (int64_t length : {0, 1, 2, 5, 8, 30}) {
        const int32_t seqlen = 7;
        const int64_t carried = num_sinks + window_size, rows = carried + seqlen;
        std::vector<int32_t> window_begin(seqlen), far_begin(rows), far_end(rows);
        WindowRowsParams params{};
        params.lengths = &length;
        params.window_begin = window_begin.data();
        params.far_begin = far_begin.data();
        params.far_end = far_end.data();
        params.batch = 1;
        params.seqlen = seqlen;
        params.window_size = window_size;
        params.num_sinks = num_sinks;
        window_rows(params);
        EXPECT_TRUE(std::is_sorted(far_begin.begin(), far_begin.end()));
        for (int64_t i = 0; i < seqlen; ++i) {
          const auto position = [&](int64_t r) { return r < num_sinks ? r : length + r - carried; };
          std::map<int64_t, int> seen, wanted;
          for (int64_t r = window_begin[i]; r <= carried + i; ++r) ++seen[position(r)];
          for (int64_t r = 0; r < rows; ++r) {
            if (far_begin[r] <= i && i < far_end[r]) ++seen[position(r)];
          }
          for (int64_t p = 0; p <= length + i; ++p) {
            if (p < num_sinks || p > length + i - window_size) wanted[p] = 1;
          }
          EXPECT_EQ(seen, wanted) << "window " << window_size << " sinks " << num_sinks << " length " << length;
        }
      }
    }
  }
}

TEST(WindowRows, DocumentsCountTheirOwnQueries) {
  const std::vector<int32_t> starts = {0, 1, 9, 20};
  constexpr int32_t kWindow = 5, kSinks = 2;
  std::vector<int32_t> window_begin(20), far_begin(20), far_end(20), num_queries(20);
  WindowRowsParams params{};
  params.cu_seqlens = starts.data();
  params.window_begin = window_begin.data();
  params.far_begin = far_begin.data();
  params.far_end = far_end.data();
  params.num_queries = num_queries.data();
  params.batch = 1;
  params.seqlen = 20;
  params.num_documents = 3;
  params.window_size = kWindow;
  params.num_sinks = kSinks;
  window_rows(params);
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    for (int32_t j = starts[d]; j < starts[d + 1]; ++j) {
      int32_t count = 0;
      for (int32_t i = j + 3; i <= j + kWindow - 1; ++i) count += i < starts[d + 1];
      EXPECT_EQ(num_queries[j], count) << j;
      EXPECT_EQ(window_begin[j], std::max(starts[d], j - kWindow + 1)) << j;
      for (int32_t i = 0; i < 20; ++i) {
        const bool far = j - starts[d] < kSinks && i >= j + kWindow && i < starts[d + 1];
        EXPECT_EQ(far_begin[j] <= i && i < far_end[j], far) << j << " at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace sparsek::cpu
