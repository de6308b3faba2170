// Byte-pair merging of one piece of text: the pair with the lowest rank first, the leftmost of equals.
//
// Short pieces scan for the lowest rank; long ones keep a linked list and a heap, so a megabyte of one letter takes
// O(n log n). It knows no special tokens and no regular expressions.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace sparsek {

class Bpe {
 public:
  struct Merge {
    TokenId left, right, merged;
  };
  struct Scratch {
    struct Node {
      TokenId id;
      int32_t previous, next;
    };
    struct Candidate {
      uint32_t rank;
      int32_t position;
      TokenId merged;
    };
    std::vector<Node> nodes;
    std::vector<Candidate> heap;
    std::vector<TokenId> ids;
    std::vector<uint32_t> ranks;
  };

  Bpe() = default;
  // byte_ids: the token of each single byte, -1 for none; such bytes become `unknown`, or vanish without one.
  // A merge's rank is its index. No pair may come twice.
  Bpe(const std::array<TokenId, 256>& byte_ids, std::vector<Merge> merges, std::optional<TokenId> unknown,
      bool fuse_unknown);

  TokenId byte_id(uint8_t byte) const { return byte_ids_[byte]; }
  std::vector<Merge> merges() const;  // by rank
  std::optional<TokenId> unknown() const { return unknown_; }
  bool fuse_unknown() const { return fuse_unknown_; }
  void encode(std::string_view piece, std::vector<TokenId>& out, Scratch& scratch) const;

 private:
  struct Slot {
    uint64_t pair;
    uint32_t rank;
    TokenId merged;
  };
  const Slot* find(TokenId left, TokenId right) const;
  void encode_short(std::vector<TokenId>& out, Scratch& scratch) const;
  void encode_long(std::vector<TokenId>& out, Scratch& scratch) const;

  std::array<TokenId, 256> byte_ids_{};
  std::optional<TokenId> unknown_;
  bool fuse_unknown_ = false;
  std::vector<Slot> slots_;  // open addressing, a power of two
  int shift_ = 63;
};

}  // namespace sparsek
