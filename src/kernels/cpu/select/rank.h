// Keys in rank order: score descending, ties to the smaller position (eq. 4), by stable radix sort and stable merge.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace sparsek::cpu {

// A key's score and whatever names it to the caller; entries of one list are made in the order of their positions.
template <class T>
struct Ranked {
  T score;
  int32_t id;
};

// Unsigned integers that ascend where scores descend. -0.0 must have been made +0.0.
template <class T>
auto descending_bits(T score) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Bits bits = std::bit_cast<Bits>(score);
  const Bits sign = Bits{1} << (sizeof(T) * 8 - 1);
  return static_cast<Bits>((bits & sign) ? bits : ~(bits | sign));
}

// Stable least-significant-digit radix sort of whole entries, a byte at a time; bytes that all entries share are
// skipped. Holds its scratch so that one thread sorts many chunks without allocating.
template <class T>
class RankSorter {
 public:
  void sort(Ranked<T>* entries, int64_t count) {
    if (count <= kInsertionLimit) return insertion_sort(entries, count);
    if (static_cast<int64_t>(scratch_.size()) < count) scratch_.resize(count);
    for (auto& histogram : histograms_) histogram.fill(0);
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = descending_bits(entries[i].score);
      for (int digit = 0; digit < kDigits; ++digit) ++histograms_[digit][(bits >> (8 * digit)) & 255];
    }
    Ranked<T>*from = entries, *to = scratch_.data();
    for (int digit = 0; digit < kDigits; ++digit) {
      auto& offsets = histograms_[digit];
      if (offsets[(descending_bits(from[0].score) >> (8 * digit)) & 255] == count) continue;
      int64_t sum = 0;
      for (int64_t& offset : offsets) sum += std::exchange(offset, sum);
      for (int64_t i = 0; i < count; ++i) {
        to[offsets[(descending_bits(from[i].score) >> (8 * digit)) & 255]++] = from[i];
      }
      std::swap(from, to);
    }
    if (from != entries) std::copy(from, from + count, entries);
  }

 private:
  static constexpr int kDigits = sizeof(T);
  static constexpr int64_t kInsertionLimit = 24;  // below it clearing the histograms costs more than the sort

  static void insertion_sort(Ranked<T>* entries, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
      const Ranked<T> entry = entries[i];
      int64_t place = i;
      for (; place > 0 && entries[place - 1].score < entry.score; --place) entries[place] = entries[place - 1];
      entries[place] = entry;
    }
  }

  std::vector<Ranked<T>> scratch_;
  std::array<std::array<int64_t, 256>, kDigits> histograms_;
};

// The first `wanted` of older and newer together, in rank order; every key of `newer` has a larger position than those
// of `older`, so older wins ties. Both lists end in an entry with score -inf; write(i, entry) receives the result.
template <class T, class Write>
void merge_ranked(const Ranked<T>* older, const Ranked<T>* newer, int64_t wanted, Write&& write) {
  for (int64_t i = 0; i < wanted; ++i) {
    const bool take_older = older->score >= newer->score;
    write(i, take_older ? *older : *newer);
    older += take_older;
    newer += !take_older;
  }
}

template <class T>
constexpr Ranked<T> list_end() {
  return {-std::numeric_limits<T>::infinity(), -1};
}

}  // namespace sparsek::cpu
