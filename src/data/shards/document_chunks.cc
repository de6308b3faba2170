#include "data/shards/document_chunks.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "data/shards/permutation.h"

namespace sparsek {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

}  // namespace

DocumentChunks::DocumentChunks(const DocumentSet& documents, const ChunkOptions& options)
    : documents_(&documents), options_(options) {
  constexpr int64_t kMaxTokens = int64_t{1} << 30;
  if (options.chunk < 1 || options.chunk > kMaxTokens) {
    throw_field("chunk", "expected 1 to {}, found {}", kMaxTokens, options.chunk);
  }
  if (options.batch < 1 || options.batch > kMaxTokens / options.chunk) {
    throw_field("batch", "expected 1 to {} rows of {} tokens, found {}", kMaxTokens / options.chunk, options.chunk,
                options.batch);
  }
  if (options.epochs < 0) throw_field("epochs", "expected 0 (without end) or more, found {}", options.epochs);
  restart();
}

void DocumentChunks::restart() {
  rows_.assign(static_cast<size_t>(options_.batch), Row());
  free_ = {};
  for (int64_t row = 0; row < options_.batch; ++row) free_.emplace(0, row);
  next_turn_ = step_ = 0;
}

void DocumentChunks::advance_to(int64_t step) {
  const int64_t size = documents_->size();
  while (free_.top().first <= step) {
    const auto [begin_step, index] = free_.top();
    free_.pop();
    Row& row = rows_[static_cast<size_t>(index)];
    row = {next_turn_, begin_step, {}};
    const int64_t epoch = next_turn_ / size;
    if (options_.epochs > 0 && epoch >= options_.epochs) {
      row.turn = -1;
      free_.emplace(kNever, index);
      continue;
    }
    int64_t number = next_turn_++ % size;
    if (options_.shuffle) number = Permutation(size, mix_bits(options_.seed, static_cast<uint64_t>(epoch)))(number);
    row.document = documents_->document(number);
    free_.emplace(begin_step + num_chunks(row.document), index);
  }
  step_ = step;
}

bool DocumentChunks::read(int64_t step, ChunkBatch& batch) {
  if (step < 0 || step == kNever) throw_field("step", "expected 0 or more, found {}", step);
  if (step < step_) restart();
  advance_to(step);
  const auto size = static_cast<size_t>(options_.batch), chunk = static_cast<size_t>(options_.chunk);
  batch.ids.assign(size * chunk, 0);
  batch.targets.assign(size * chunk, kIgnoredTarget);
  batch.is_reset.assign(size, 0);
  batch.num_tokens.assign(size, 0);
  batch.document.assign(size, -1);
  batch.offset.assign(size, 0);
  batch.num_targets = 0;
  std::vector<TokenId> tokens;
  for (size_t r = 0; r < size; ++r) {
    const Row& row = rows_[r];
    if (row.turn < 0) continue;
    const int64_t offset = (step - row.begin_step) * options_.chunk;
    const int64_t count = std::min(options_.chunk, row.document.size() - 1 - offset);
    tokens.resize(static_cast<size_t>(count) + 1);
    documents_->shards().read(row.document.begin + offset, tokens);
    std::copy(tokens.begin(), tokens.end() - 1, batch.ids.begin() + static_cast<int64_t>(r * chunk));
    std::copy(tokens.begin() + 1, tokens.end(), batch.targets.begin() + static_cast<int64_t>(r * chunk));
    batch.is_reset[r] = offset == 0;
    batch.num_tokens[r] = static_cast<int32_t>(count);
    batch.document[r] = row.document.index;
    batch.offset[r] = offset;
    batch.num_targets += count;
  }
  return batch.num_targets > 0;
}

int64_t DocumentChunks::num_steps() const {
  if (options_.epochs == 0) throw_field("epochs", "expected a number of epochs to count the steps of, found none");
  DocumentChunks walk(*documents_, options_);
  int64_t steps = 0;
  while (walk.free_.top().first != kNever) {
    steps = walk.free_.top().first;
    walk.advance_to(steps);
  }
  return steps;
}

}  // namespace sparsek
