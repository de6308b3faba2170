// Whole documents in order for chunk-recurrent training: each row of the batch goes through a document of its own in
// chunks, and takes the next one when it is through.
//
// Documents are handed out in an order that the seed decides, a new one each epoch, to the row that is free first (the
// lowest of several), so an epoch's documents are all begun before the next epoch's. A chunk holds one document only:
// state is reset at chunk begins, and a document's last chunk is filled up. What step s holds is found from s alone, by
// walking the documents' lengths (not their tokens): the state of a run is its step number.
#pragma once
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

#include "data/shards/document_set.h"
#include "data/shards/packed_rows.h"
#include "data/tokenizer.h"

namespace sparsek {

struct ChunkOptions {
  int64_t chunk = 0;  // tokens
  int64_t batch = 1;
  uint64_t seed = 0;
  bool shuffle = true;
  int64_t epochs = 0;  // 0: without end
};

struct ChunkBatch {
  std::vector<TokenId> ids;       // [batch, chunk], 0 behind a document's end
  std::vector<TokenId> targets;   // [batch, chunk]: the document's next token, also across chunks; else kIgnoredTarget
  std::vector<uint8_t> is_reset;  // [batch]: a document begins; the state before it does not count
  std::vector<int32_t> num_tokens;  // [batch]: that count; 0: the row has nothing left to do
  std::vector<int64_t> document;    // [batch]: index in the shards, -1: none
  std::vector<int64_t> offset;      // [batch]: of the chunk in its document
  int64_t num_targets = 0;          // not ignored
};

class DocumentChunks {
 public:
  // The set outlives it. Throws UsageError naming the option that is wrong.
  DocumentChunks(const DocumentSet& documents, const ChunkOptions& options);

  // False when all epochs are through, and then the batch is empty. Any step may be asked for; those after the last
  // one read cost what lies between, those before it what lies before them.
  bool read(int64_t step, ChunkBatch& batch);
  int64_t num_steps() const;  // of all epochs, which `epochs` bounds

 private:
  struct Row {
    int64_t turn = -1;  // of the document, in the order they are handed out; -1: none
    int64_t begin_step = 0;
    DocumentSet::Document document{};
  };
  // Free from a step on, and its row: the least is served first.
  using Free = std::pair<int64_t, int64_t>;

  void restart();
  void advance_to(int64_t step);
  int64_t num_chunks(const DocumentSet::Document& document) const {
    return (document.size() - 1 + options_.chunk - 1) / options_.chunk;  // the last token is a target only
  }

  const DocumentSet* documents_;
  ChunkOptions options_;
  std::vector<Row> rows_;
  std::priority_queue<Free, std::vector<Free>, std::greater<>> free_;
  int64_t next_turn_ = 0, step_ = 0;
};

}  // namespace sparsek
