#include "train/batches.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <charconv>
#include <numeric>
#include <random>

#include "base/error.h"
#include "data/quote.h"
#include "model/config.h"
#include "train/token_loss.h"

namespace sparsek::train {
namespace {

class Recall final : public BatchSource {
 public:
  explicit Recall(const RecallOptions& options) : options_(options) {}

  Batch next() override {
    Batch batch;
    batch.ids = at::empty({options_.batch, options_.seqlen}, at::kLong);
    batch.targets = at::full({options_.batch, options_.seqlen}, kIgnored, at::kLong);
    // Each batch has a generator of its own: any can be made without those before it.
    std::seed_seq seed{static_cast<uint64_t>(options_.seed), static_cast<uint64_t>(options_.split),
                       static_cast<uint64_t>(index_)};
    std::mt19937_64 generator(seed);
    for (int64_t row = 0; row < options_.batch; ++row) {
      fill(batch.ids[row].mutable_data_ptr<int64_t>(), batch.targets[row].mutable_data_ptr<int64_t>(), generator);
    }
    batch.num_targets = batch.targets.ne(kIgnored).sum().item<int64_t>();
    ++index_;
    return batch;
  }
  std::string position() const override { return std::to_string(index_); }
  void seek(const std::string& position) override { index_ = parse_position(position, "of the recall task"); }
  int64_t vocab_size() const override { return options_.num_noise + options_.num_keys + options_.num_values; }

 private:
  // Ids: noise, then keys, then values. std's distributions differ between libraries; a remainder does not.
  void fill(int64_t* ids, int64_t* targets, std::mt19937_64& generator) const {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); };
    const auto shuffled = [&](int64_t n) {
      std::vector<int64_t> order(n);
      std::iota(order.begin(), order.end(), 0);
      for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
      return order;
    };
    const int64_t pairs = options_.num_pairs, questions = options_.seqlen - 2 * pairs;
    for (int64_t t = 0; t < questions; ++t) ids[t] = below(options_.num_noise);
    const std::vector<int64_t> keys = shuffled(options_.num_keys);
    std::vector<int64_t> asked = shuffled(pairs);
    if (options_.split == Split::kTrain) {
      for (int64_t& pair : asked) pair = below(pairs);
    }
    // Pairs at even positions of the first part, no two at the same one.
    const int64_t num_places = (questions - options_.gap) / 2, reach = std::max<int64_t>(options_.reach / 2, 1);
    std::vector<uint8_t> is_taken(num_places, 0);
    std::vector<int64_t> values(pairs);
    const auto tell = [&](int64_t place, int64_t pair) {
      is_taken[place] = 1;
      ids[2 * place] = options_.num_noise + keys[pair];
      ids[2 * place + 1] = values[pair];
    };
    const std::vector<int64_t> places = shuffled(num_places);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      values[pair] = options_.num_noise + options_.num_keys + below(options_.num_values);
      tell(places[pair], pair);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int64_t repeat = 0; repeat < options_.num_repeats; ++repeat) {
        const int64_t place = places[pair] + 1 + below(reach);
        if (place >= num_places || is_taken[place] != 0) continue;
        tell(place, pair);
        if (options_.split == Split::kTrain) targets[2 * place] = values[pair];
      }
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t t = questions + 2 * i;
      ids[t] = options_.num_noise + keys[asked[i]];
      ids[t + 1] = targets[t] = values[asked[i]];
    }
  }

  RecallOptions options_;
  int64_t index_ = 0;
};

class Chunks final : public BatchSource {
 public:
  Chunks(std::unique_ptr<BatchSource> rows, int64_t chunk) : rows_(std::move(rows)), chunk_(chunk) {}

  Batch next() override {
    if (next_ == 0) {
      row_position_ = rows_->position();
      current_ = rows_->next();
      TORCH_CHECK(current_.document_ends.empty(), "packed rows cannot be cut into chunks");
    }
    const int64_t batch = current_.ids.size(0), seqlen = current_.ids.size(1);
    const int64_t first = next_ * chunk_, count = std::min(chunk_, seqlen - first);
    Batch result;
    result.ids = at::full({batch, chunk_}, 0, at::kLong);  // what is behind the document is read by nobody
    result.targets = at::full({batch, chunk_}, kIgnored, at::kLong);
    result.ids.narrow(1, 0, count).copy_(current_.ids.narrow(1, first, count));
    result.targets.narrow(1, 0, count).copy_(current_.targets.narrow(1, first, count));
    result.num_targets = result.targets.ne(kIgnored).sum().item<int64_t>();
    result.starts.assign(batch, next_ == 0 ? 1 : 0);
    next_ = first + count < seqlen ? next_ + 1 : 0;
    return result;
  }
  std::string position() const override {
    return next_ == 0 ? rows_->position() + " 0" : row_position_ + " " + std::to_string(next_);
  }
  void seek(const std::string& position) override {
    const size_t space = position.rfind(' ');
    if (space == std::string::npos) throw_data("position of chunks: expected two parts, found {}", in_quotes(position));
    const int64_t chunk = parse_position(position.substr(space + 1), "of chunks");
    rows_->seek(position.substr(0, space));
    next_ = 0;
    while (next_ < chunk) {
      const int64_t before = next_;
      next();
      if (next_ <= before) throw_data("position of chunks: expected one inside a row, found {}", in_quotes(position));
    }
  }
  int64_t vocab_size() const override { return rows_->vocab_size(); }

 private:
  std::unique_ptr<BatchSource> rows_;
  int64_t chunk_, next_ = 0;  // chunk of the current rows; 0: new rows
  Batch current_;
  std::string row_position_;
};

class WithoutEarly final : public BatchSource {
 public:
  WithoutEarly(std::unique_ptr<BatchSource> batches, int64_t first) : batches_(std::move(batches)), first_(first) {}

  Batch next() override {
    Batch batch = batches_->next();
    const int64_t rows = batch.targets.size(0), seqlen = batch.targets.size(1);
    positions_.resize(rows, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const at::Tensor targets = batch.targets[row];
      // Drops the targets of inputs [begin, begin + count), of which the first is at `position`.
      const auto drop = [&](int64_t begin, int64_t count, int64_t position) {
        const int64_t early = std::clamp<int64_t>(first_ - 1 - position, 0, count);
        targets.narrow(0, begin, early).fill_(kIgnored);
      };
      if (batch.document_ends.empty()) {
        if (batch.starts.empty() || batch.starts[row] != 0) positions_[row] = 0;
        drop(0, seqlen, positions_[row]);
        positions_[row] += seqlen;
      } else {
        int64_t begin = 0;
        for (const int32_t end : batch.document_ends) {
          drop(begin, end - begin, 0);
          begin = end;
        }
      }
    }
    batch.num_targets = batch.targets.ne(kIgnored).sum().item<int64_t>();
    return batch;
  }
  std::string position() const override {
    std::string text = batches_->position();
    for (const int64_t position : positions_) text += "/" + std::to_string(position);
    return text;
  }
  void seek(const std::string& position) override {
    const size_t end = position.find('/');
    batches_->seek(position.substr(0, end));
    positions_.clear();
    for (size_t at = end; at != std::string::npos;) {
      const size_t next = position.find('/', at + 1);
      positions_.push_back(parse_position(position.substr(at + 1, next - at - 1), "in its document"));
      at = next;
    }
  }
  int64_t vocab_size() const override { return batches_->vocab_size(); }
  std::string fingerprint() const override { return batches_->fingerprint(); }
  std::optional<int64_t> rows_per_epoch() const override { return batches_->rows_per_epoch(); }

 private:
  std::unique_ptr<BatchSource> batches_;
  int64_t first_;
  std::vector<int64_t> positions_;  // of each row's next input in its document; empty: none was read yet
};

}  // namespace

int64_t parse_position(const std::string& text, const char* where) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) {
    throw_data("position {}: expected a number, found {}", where, in_quotes(text));
  }
  return value;
}

std::unique_ptr<BatchSource> make_recall(const RecallOptions& options) {
  const int64_t shortest = 2 * (2 + options.num_repeats) * options.num_pairs + options.gap;
  if (options.seqlen < shortest) {
    throw_field("data.seqlen",
                "expected at least {} for {} pairs, their questions and {} tokens between them, found {}", shortest,
                options.num_pairs, options.gap, options.seqlen);
  }
  return std::make_unique<Recall>(options);
}

std::unique_ptr<BatchSource> cut_into_chunks(std::unique_ptr<BatchSource> rows, int64_t chunk) {
  return std::make_unique<Chunks>(std::move(rows), chunk);
}

std::unique_ptr<BatchSource> without_early_targets(std::unique_ptr<BatchSource> batches, int64_t first) {
  return std::make_unique<WithoutEarly>(std::move(batches), first);
}

namespace {

std::unique_ptr<BatchSource> open_all(const TrainConfig& config, Split split) {
  const DataOptions& data = config.data;
  if (data.task == "shards") return open_shards(config, split);
  // A window can pass something on once a layer: with this gap no window reaches from a question to its pair.
  const int64_t num_layers =
      config.model.base.empty() ? config.model.num_layers : model::read_model_config(config.model.base).num_layers;
  const int64_t window = largest_window(config.attention), gap = num_layers * window;
  auto rows = make_recall({.batch = data.batch,
                           .seqlen = data.seqlen,
                           .num_pairs = data.recall_pairs,
                           .num_keys = data.recall_keys,
                           .num_values = data.recall_values,
                           .num_noise = data.recall_noise,
                           .num_repeats = data.recall_repeats,
                           .reach = window,
                           .gap = gap,
                           .seed = config.run.seed,
                           .split = split});
  return config.recurrent.chunk > 0 ? cut_into_chunks(std::move(rows), config.recurrent.chunk) : std::move(rows);
}

}  // namespace

std::unique_ptr<BatchSource> open_batches(const TrainConfig& config, Split split) {
  std::unique_ptr<BatchSource> batches = open_all(config, split);
  const int64_t first = config.validation.from_position;
  return split == Split::kValidation && first > 0 ? without_early_targets(std::move(batches), first)
                                                  : std::move(batches);
}

}  // namespace sparsek::train
