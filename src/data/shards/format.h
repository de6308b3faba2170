// The file of a token shard. All numbers little-endian:
//
//   header            128 bytes, below
//   tokens            num_tokens of uint16 (vocabularies up to 65,536) or uint32, zeros up to a multiple of 8 bytes
//   document begins   num_documents of int64, ascending: where in this shard each document that begins here begins
//   document keys     num_documents of uint64: hash of the document's first 64 KiB of text, which splits go by
//
// Tokens before the first begin belong to the last document of the shards before: a document may go through any number
// of shards.
#pragma once
#include <bit>
#include <cstdint>

namespace sparsek {

static_assert(std::endian::native == std::endian::little, "shards are mapped as they are");

struct ShardHeader {
  char magic[8];         // "SPKTOKEN"
  uint32_t version;      // 1
  uint32_t token_bytes;  // 2 or 4
  int64_t vocab_size;    // every id is below
  int64_t num_tokens;
  int64_t num_documents;  // that begin here
  char tokenizer[64];     // Tokenizer::fingerprint()
  char reserved[24];      // zeros
};
static_assert(sizeof(ShardHeader) == 128);

inline constexpr char kShardMagic[8] = {'S', 'P', 'K', 'T', 'O', 'K', 'E', 'N'};
inline constexpr uint32_t kShardVersion = 1;
inline constexpr const char* kManifestName = "manifest.json";
inline constexpr const char* kManifestFormat = "sparsek-shards-1";

inline uint32_t shard_token_bytes(int64_t vocab_size) {
  return vocab_size <= 65536 ? 2 : 4;
}
// Where the document begins stand.
inline int64_t shard_begins_offset(int64_t num_tokens, int64_t token_bytes) {
  return static_cast<int64_t>(sizeof(ShardHeader)) + (num_tokens * token_bytes + 7) / 8 * 8;
}
inline int64_t shard_size_bytes(int64_t num_tokens, int64_t token_bytes, int64_t num_documents) {
  return shard_begins_offset(num_tokens, token_bytes) + num_documents * 16;
}

}  // namespace sparsek
