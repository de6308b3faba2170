#include "data/corpus/tokenize.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/sha256.h"
#include "data/corpus/job_folder.h"
#include "data/shards/permutation.h"
#include "data/shards/writer.h"

namespace sparsek {
namespace {

constexpr int64_t kMaxShardDocuments = int64_t{1} << 20;  // their begins are held in memory until the shard is written

struct Stopped {};  // thrown by workers when another one failed or the caller said no

// FNV-1a of a document's first piece, its bits mixed.
uint64_t document_key(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return mix_bits(hash);
}

nlohmann::ordered_json describe_job(const Tokenizer& tokenizer, const TokenizeOptions& options,
                                    const std::vector<InputFile>& files) {
  Sha256 listing, modified;
  int64_t size_bytes = 0;
  for (const InputFile& file : files) {
    listing.update(file.path);
    listing.update(fmt::format("{}{}\n", '\0', file.size_bytes));
    modified.update(fmt::format("{}\n", file.modified_ns));
    size_bytes += file.size_bytes;
  }
  nlohmann::ordered_json end_token;
  if (options.end_token) end_token = *options.end_token;
  return {{"tokenizer", {{"sha256", tokenizer.fingerprint()}, {"vocab_size", tokenizer.vocab_size()}}},
          {"options",
           {{"prefix", tokenizer.prefix()},
            {"end_token", end_token},
            {"special_tokens", options.special == SpecialTokens::kParse ? "parsed" : "as text"},
            {"field", options.documents.field},
            {"skip_bad_lines", options.documents.skip_bad_lines},
            {"shard_bytes", options.shard_bytes}}},
          {"inputs",
           {{"files", files.size()}, {"bytes", size_bytes}, {"listing", listing.hex()}, {"modified", modified.hex()}}}};
}

class Run {
 public:
  Run(const Tokenizer& tokenizer, const TokenizeOptions& options, std::vector<InputFile> files, JobFolder& folder)
      : tokenizer_(tokenizer),
        options_(options),
        files_(std::move(files)),
        units_(plan_units(files_, options.shard_bytes)),
        folder_(folder),
        fingerprint_(tokenizer.fingerprint()),
        prefix_(tokenizer.prefix()) {
    for (size_t i = 0; i < units_.size(); ++i) {
      Work work{static_cast<int64_t>(i), 0, std::nullopt};
      bool is_finished = false;
      while (!is_finished) {
        std::optional<UnitPart> part = folder.find_part(work.unit, work.part);
        if (!part) break;
        resumed_shards_ += part->shard.has_value();
        is_finished = !part->next;
        if (part->next) {
          work.start = std::move(part->next);
          ++work.part;
        }
      }
      if (is_finished) continue;
      bytes_to_read_ += unit_bytes(units_[i]);
      work_.push_back(std::move(work));
    }
  }

  TokenizeResult run(const std::function<bool(const TokenizeProgress&)>& go_on) {
    const auto count = std::min<size_t>(static_cast<size_t>(options_.threads), work_.size());
    running_ = static_cast<int>(count);
    bool is_stopped = false;
    {
      struct Threads {  // however this ends, they end first
        std::atomic<bool>& stop;
        std::vector<std::thread> all;
        int exceptions = std::uncaught_exceptions();
        ~Threads() {
          if (std::uncaught_exceptions() > exceptions) stop = true;
          for (std::thread& thread : all) thread.join();
        }
      } threads{stop_, {}};
      for (size_t i = 0; i < count; ++i) threads.all.emplace_back([this] { work_on(); });
      std::unique_lock lock(mutex_);
      while (running_ > 0) {
        changed_.wait_for(lock, std::chrono::milliseconds(100));
        lock.unlock();
        if (!is_stopped && !go_on(progress())) stop_ = is_stopped = true;
        lock.lock();
      }
    }
    if (error_) std::rethrow_exception(error_);
    TokenizeResult result{.resumed_shards = resumed_shards_, .run_tokens = tokens_, .run_text_bytes = text_bytes_};
    if (is_stopped && stop_seen_) return result;
    result.totals = folder_.finish(files_, static_cast<int64_t>(units_.size()));
    result.is_complete = true;
    return result;
  }

 private:
  struct Work {
    int64_t unit, part;
    std::optional<UnitPart::Next> start;
  };

  int64_t unit_bytes(const WorkUnit& unit) const {
    if (unit.end >= 0) return unit.end - unit.begin;
    int64_t size_bytes = 0;
    for (int64_t i = unit.first_file; i < unit.end_file; ++i) size_bytes += files_[static_cast<size_t>(i)].size_bytes;
    return size_bytes;
  }

  TokenizeProgress progress() const {
    const int64_t done = bytes_done_.load();
    return {tokens_.load(), done, std::max<int64_t>(bytes_to_read_ - done, 0)};
  }

  void work_on() {
    size_t at = 0;
    try {
      Encoder encoder(tokenizer_, options_.special);  // one a thread: it remembers words
      while (!stop_ && (at = next_work_++) < work_.size()) run_unit(work_[at], encoder);
    } catch (const Stopped&) {
      stop_seen_ = true;
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_ || at < error_at_) {  // the error that a single thread would meet first
        error_ = std::current_exception();
        error_at_ = at;
      }
      stop_ = true;
    }
    if (next_work_ < work_.size()) stop_seen_ = stop_seen_ || stop_;
    const std::lock_guard lock(mutex_);
    --running_;
    changed_.notify_all();
  }

  void run_unit(Work& work, Encoder& encoder) {
    std::optional<DocumentPiece::Position> start;
    if (work.start) {
      start = work.start->position;
      encoder.restore(work.start->encoder);
    }
    DocumentReader reader(files_, units_[static_cast<size_t>(work.unit)], options_.documents, bytes_done_, start);
    std::optional<ShardWriter> shard;
    UnitPart part;
    DocumentPiece piece;
    std::vector<TokenId> ids;
    while (reader.next(piece)) {
      if (stop_) throw Stopped();
      if (piece.text.empty()) continue;  // an empty document
      if (shard && (part.text_bytes >= options_.shard_bytes ||
                    (piece.is_first && shard->num_documents() >= kMaxShardDocuments))) {
        part.next = UnitPart::Next{piece.position, encoder.save()};
        finish_part(work, reader, shard, part);
        ++work.part;
      }
      if (!shard) shard.emplace(folder_.shard_path(work.unit, work.part), tokenizer_.vocab_size(), fingerprint_);
      if (piece.is_first) {
        shard->begin_document(document_key(piece.text));
        shard->append(prefix_);
      }
      ids.clear();
      encoder.push(piece.text, ids);
      if (piece.is_last) {
        encoder.finish(ids);
        if (options_.end_token) ids.push_back(*options_.end_token);
      }
      shard->append(ids);
      const auto size = static_cast<int64_t>(piece.text.size());
      part.text_bytes += size;
      text_bytes_ += size;
      tokens_ += static_cast<int64_t>(ids.size() + (piece.is_first ? prefix_.size() : 0));
    }
    finish_part(work, reader, shard, part);
  }

  // The shard is on the disk before anything says so.
  void finish_part(const Work& work, DocumentReader& reader, std::optional<ShardWriter>& shard, UnitPart& part) {
    part.records = reader.take_records();
    if (shard) part.shard = shard->finish();
    shard.reset();
    folder_.add_part(work.unit, work.part, part);
    part = {};
  }

  const Tokenizer& tokenizer_;
  const TokenizeOptions& options_;
  const std::vector<InputFile> files_;
  const std::vector<WorkUnit> units_;
  JobFolder& folder_;
  const std::string fingerprint_;
  const std::vector<TokenId> prefix_;
  std::vector<Work> work_;  // what is left
  int64_t resumed_shards_ = 0, bytes_to_read_ = 0;

  std::atomic<size_t> next_work_ = 0;
  std::atomic<int64_t> bytes_done_ = 0, tokens_ = 0, text_bytes_ = 0;
  std::atomic<bool> stop_ = false, stop_seen_ = false;  // seen: something is left undone
  std::mutex mutex_;
  std::condition_variable changed_;
  int running_ = 0;
  std::exception_ptr error_;
  size_t error_at_ = 0;
};

}  // namespace

std::optional<TokenId> default_end_token(const Tokenizer& tokenizer) {
  for (const char* text : {"<|endoftext|>", "<|end_of_text|>"}) {
    if (const auto id = tokenizer.find_special(text)) return id;
  }
  return std::nullopt;
}

TokenizeResult tokenize_corpus(const Tokenizer& tokenizer, const TokenizeOptions& options,
                               const std::function<bool(const TokenizeProgress&)>& go_on) {
  std::vector<InputFile> files = find_inputs(options.inputs);
  JobFolder folder(options.out, describe_job(tokenizer, options, files));
  if (folder.is_complete()) {
    TokenizeResult result{.is_complete = true, .was_complete = true, .totals = folder.complete_totals()};
    result.resumed_shards = result.totals.shards;
    return result;
  }
  Run run(tokenizer, options, std::move(files), folder);
  try {
    return run.run(go_on);
  } catch (const WriteError& error) {
    throw WriteError(std::string(error.what()) +
                     "; finished shards are kept: make room and run the same command again");
  }
}

}  // namespace sparsek
