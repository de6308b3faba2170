// Batches from token shards: packed rows, or whole documents in chunks for recurrent training.
#include <ATen/ops/from_blob.h>

#include <utility>

#include "base/error.h"
#include "data/shards/document_chunks.h"
#include "data/shards/packed_rows.h"
#include "train/batches.h"
#include "train/token_loss.h"

namespace sparsek::train {
namespace {

static_assert(kIgnored == kIgnoredTarget);

at::Tensor as_tensor(std::vector<TokenId>& ids, at::IntArrayRef shape) {
  return at::from_blob(ids.data(), shape, at::kInt).to(at::kLong);
}

struct Documents {
  TokenShards shards;
  DocumentSet set;
  Documents(const std::string& folder, const DocumentSetOptions& options) : shards(folder), set(shards, options) {}
};

// A batch is one row: its rows of seqlen tokens behind each other, each the begin of a stretch.
class Packed final : public BatchSource {
 public:
  Packed(std::unique_ptr<Documents> documents, int64_t batch, const PackedOptions& options)
      : documents_(std::move(documents)), rows_(documents_->set, options), batch_(batch) {}

  Batch next() override {
    rows_.read(next_row_, batch_, buffer_);
    next_row_ += batch_;
    const auto tokens = static_cast<int64_t>(buffer_.ids.size());
    Batch batch;
    batch.ids = as_tensor(buffer_.ids, {1, tokens});
    batch.targets = as_tensor(buffer_.targets, {1, tokens});
    batch.document_ends.assign(buffer_.cu_seqlens.begin() + 1, buffer_.cu_seqlens.end());
    batch.num_targets = buffer_.num_targets;
    return batch;
  }
  std::string position() const override { return std::to_string(next_row_); }
  void seek(const std::string& position) override { next_row_ = parse_position(position, "in token shards"); }
  std::optional<int64_t> rows_per_epoch() const override { return rows_.rows_per_epoch(); }
  int64_t vocab_size() const override { return documents_->shards.vocab_size(); }
  std::string fingerprint() const override { return documents_->shards.fingerprint(); }

 private:
  std::unique_ptr<Documents> documents_;
  PackedRows rows_;
  int64_t batch_, next_row_ = 0;
  PackedBatch buffer_;
};

class Chunked final : public BatchSource {
 public:
  Chunked(std::unique_ptr<Documents> documents, const ChunkOptions& options)
      : documents_(std::move(documents)), chunks_(documents_->set, options), options_(options) {}

  Batch next() override {
    chunks_.read(step_++, buffer_);
    Batch batch;
    batch.ids = as_tensor(buffer_.ids, {options_.batch, options_.chunk});
    batch.targets = as_tensor(buffer_.targets, {options_.batch, options_.chunk});
    batch.starts = buffer_.is_reset;
    batch.num_targets = buffer_.num_targets;
    return batch;
  }
  std::string position() const override { return std::to_string(step_); }
  void seek(const std::string& position) override { step_ = parse_position(position, "in token shards"); }
  int64_t vocab_size() const override { return documents_->shards.vocab_size(); }
  std::string fingerprint() const override { return documents_->shards.fingerprint(); }

 private:
  std::unique_ptr<Documents> documents_;
  DocumentChunks chunks_;
  ChunkOptions options_;
  int64_t step_ = 0;
  ChunkBatch buffer_;
};

}  // namespace

std::unique_ptr<BatchSource> open_shards(const TrainConfig& config, Split split) {
  const DataOptions& data = config.data;
  const auto seed = static_cast<uint64_t>(config.run.seed);
  const bool is_training = split == Split::kTrain;
  const bool has_own_validation = !data.validation.empty();
  auto documents = std::make_unique<Documents>(is_training || !has_own_validation ? data.train : data.validation,
                                               DocumentSetOptions{.split = has_own_validation ? sparsek::Split::kAll
                                                                           : is_training      ? sparsek::Split::kTrain
                                                                                         : sparsek::Split::kValidation,
                                                                  .validation_fraction = data.validation_fraction,
                                                                  .seed = 0,  // the parts are the same in every run
                                                                  .min_tokens = data.min_tokens});
  if (config.recurrent.chunk > 0) {
    return std::make_unique<Chunked>(
        std::move(documents),
        ChunkOptions{.chunk = config.recurrent.chunk, .batch = data.batch, .seed = seed, .shuffle = is_training});
  }
  return std::make_unique<Packed>(std::move(documents), data.batch,
                                  PackedOptions{.seqlen = data.seqlen, .seed = seed, .shuffle = is_training});
}

}  // namespace sparsek::train
