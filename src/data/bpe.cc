#include "data/bpe.h"

#include <algorithm>
#include <bit>

namespace sparsek {
namespace {

constexpr uint64_t kEmptyPair = ~uint64_t{0};
constexpr uint32_t kNoRank = ~uint32_t{0};
constexpr size_t kShortPiece = 48;  // up to here scanning costs less than the heap

uint64_t pair_of(TokenId left, TokenId right) {
  return (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
}
uint64_t spread(uint64_t pair) {
  return (pair ^ (pair >> 29)) * 0x9e3779b97f4a7c15u;
}

}  // namespace

Bpe::Bpe(const std::array<TokenId, 256>& byte_ids, std::vector<Merge> merges, std::optional<TokenId> unknown,
         bool fuse_unknown)
    : byte_ids_(byte_ids), unknown_(unknown), fuse_unknown_(fuse_unknown) {
  const size_t size = std::bit_ceil(std::max<size_t>(merges.size() * 2, 16));
  shift_ = 64 - std::countr_zero(size);
  slots_.assign(size, Slot{kEmptyPair, kNoRank, -1});
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = pair_of(merges[rank].left, merges[rank].right);
    size_t i = spread(pair) >> shift_;
    while (slots_[i].pair != kEmptyPair) i = (i + 1) & (size - 1);
    slots_[i] = {pair, static_cast<uint32_t>(rank), merges[rank].merged};
  }
}

std::vector<Bpe::Merge> Bpe::merges() const {
  std::vector<Merge> merges(static_cast<size_t>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.rank != kNoRank; })));
  for (const Slot& slot : slots_) {
    if (slot.rank == kNoRank) continue;
    merges[slot.rank] = {static_cast<TokenId>(slot.pair >> 32), static_cast<TokenId>(slot.pair & 0xffffffffu),
                         slot.merged};
  }
  return merges;
}

const Bpe::Slot* Bpe::find(TokenId left, TokenId right) const {
  const uint64_t pair = pair_of(left, right);
  for (size_t i = spread(pair) >> shift_;; i = (i + 1) & (slots_.size() - 1)) {
    if (slots_[i].pair == pair) return &slots_[i];
    if (slots_[i].pair == kEmptyPair) return nullptr;
  }
}

void Bpe::encode(std::string_view piece, std::vector<TokenId>& out, Scratch& scratch) const {
  scratch.ids.clear();
  bool last_was_unknown = false;
  for (const char c : piece) {
    const TokenId id = byte_ids_[static_cast<uint8_t>(c)];
    if (id >= 0) {
      scratch.ids.push_back(id);
    } else if (unknown_ && !(fuse_unknown_ && last_was_unknown)) {
      scratch.ids.push_back(*unknown_);
    }
    last_was_unknown = id < 0;
  }
  if (scratch.ids.size() <= 1) {
    out.insert(out.end(), scratch.ids.begin(), scratch.ids.end());
  } else if (scratch.ids.size() <= kShortPiece) {
    encode_short(out, scratch);
  } else {
    encode_long(out, scratch);
  }
}

void Bpe::encode_short(std::vector<TokenId>& out, Scratch& scratch) const {
  std::vector<TokenId>& ids = scratch.ids;
  std::vector<uint32_t>& ranks = scratch.ranks;  // of the pair that begins at each id
  const auto rank_at = [&](size_t i) {
    const Slot* slot = i + 1 < ids.size() ? find(ids[i], ids[i + 1]) : nullptr;
    return slot != nullptr ? slot->rank : kNoRank;
  };
  ranks.resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) ranks[i] = rank_at(i);
  while (true) {
    const auto lowest = std::min_element(ranks.begin(), ranks.end());  // the leftmost of equals
    if (*lowest == kNoRank) break;
    const auto i = static_cast<size_t>(lowest - ranks.begin());
    ids[i] = find(ids[i], ids[i + 1])->merged;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    ranks.erase(ranks.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    ranks[i] = rank_at(i);
    if (i > 0) ranks[i - 1] = rank_at(i - 1);
  }
  out.insert(out.end(), ids.begin(), ids.end());
}

void Bpe::encode_long(std::vector<TokenId>& out, Scratch& scratch) const {
  constexpr TokenId kGone = -1;
  auto& nodes = scratch.nodes;
  auto& heap = scratch.heap;
  const auto later = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  const auto add = [&](int32_t left) {
    const int32_t right = nodes[static_cast<size_t>(left)].next;
    if (right < 0) return false;
    const Slot* slot = find(nodes[static_cast<size_t>(left)].id, nodes[static_cast<size_t>(right)].id);
    if (slot == nullptr) return false;
    heap.push_back({slot->rank, left, slot->merged});
    return true;
  };

  const auto count = static_cast<int32_t>(scratch.ids.size());
  nodes.resize(scratch.ids.size());
  heap.clear();
  for (int32_t i = 0; i < count; ++i) {
    nodes[static_cast<size_t>(i)] = {scratch.ids[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1};
  }
  for (int32_t i = 0; i < count; ++i) add(i);
  std::make_heap(heap.begin(), heap.end(), later);

  while (!heap.empty()) {
    const Scratch::Candidate candidate = heap.front();
    std::pop_heap(heap.begin(), heap.end(), later);
    heap.pop_back();
    Scratch::Node& left = nodes[static_cast<size_t>(candidate.position)];
    if (left.id == kGone || left.next < 0) continue;
    Scratch::Node& right = nodes[static_cast<size_t>(left.next)];
    const Slot* slot = find(left.id, right.id);
    if (slot == nullptr || slot->rank != candidate.rank) continue;  // one of the two has been merged since

    left.id = candidate.merged;
    right.id = kGone;
    left.next = right.next;
    if (left.next >= 0) nodes[static_cast<size_t>(left.next)].previous = candidate.position;
    if (add(candidate.position)) std::push_heap(heap.begin(), heap.end(), later);
    if (left.previous >= 0 && add(left.previous)) std::push_heap(heap.begin(), heap.end(), later);
  }
  for (int32_t i = 0; i >= 0; i = nodes[static_cast<size_t>(i)].next) out.push_back(nodes[static_cast<size_t>(i)].id);
}

}  // namespace sparsek
