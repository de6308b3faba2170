// Reading token shards: documents through several shards, splits, orders, packed rows and chunks against plain
// transcriptions, exact resume, and damaged files.
#include "data/shards/token_shards.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <set>

#include "data/shards/document_chunks.h"
#include "data/shards/document_set.h"
#include "data/shards/packed_rows.h"
#include "data/shards/permutation.h"
#include "data/shards/writer.h"
#include "tests/data/support.h"

namespace sparsek {
namespace {

using nlohmann::json;
using test::expect_refused;
using test::TemporaryFolder;

const std::string kTokenizer(64, 'a');

// Shards of these documents, each shard `shard_tokens` long, as a run would leave them. Each token is its position
// and 1.
std::string write_shards(const TemporaryFolder& folder, const std::vector<int64_t>& lengths, int64_t shard_tokens,
                         int64_t vocab_size, const std::string& name = "shards") {
  const std::string path = folder.file(name);
  std::filesystem::create_directory(path);
  json shards = json::array();
  std::optional<ShardWriter> writer;
  int64_t total = 0;
  const auto finish = [&] {
    const ShardSummary shard = writer->finish();
    shards.push_back({{"file", "s" + std::to_string(shards.size())},
                      {"tokens", shard.num_tokens},
                      {"documents", shard.num_documents},
                      {"bytes", shard.size_bytes},
                      {"sha256", shard.sha256}});
    writer.reset();
  };
  for (size_t d = 0; d < lengths.size(); ++d) {
    for (int64_t i = 0; i < lengths[d] || i == 0; ++i) {
      if (writer && writer->num_tokens() == shard_tokens) finish();
      if (!writer) writer.emplace(path + "/s" + std::to_string(shards.size()), vocab_size, kTokenizer);
      if (i == 0) writer->begin_document(mix_bits(d, 77));
      if (i == lengths[d]) break;  // an empty document
      const TokenId id[1] = {static_cast<TokenId>(++total)};
      writer->append(id);
    }
  }
  finish();
  const json manifest{
      {"format", "sparsek-shards-1"},
      {"tokens", total},
      {"documents", lengths.size()},
      {"job",
       {{"tokenizer", {{"sha256", kTokenizer}, {"vocab_size", vocab_size}}}, {"options", {{"prefix", json::array()}}}}},
      {"shards", shards}};
  std::ofstream(path + "/manifest.json") << manifest.dump();
  return path;
}

std::vector<int64_t> some_lengths(size_t count, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int64_t> lengths(count);
  for (int64_t& length : lengths)
    length = rng() % 5 == 0 ? rng() % 3 : rng() % 7 == 0 ? 200 + rng() % 300 : 3 + rng() % 40;
  return lengths;
}

TEST(TokenShards, AreOneSequenceHoweverTheyAreCut) {
  const TemporaryFolder folder;
  for (const int64_t shard_tokens : {100'000, 1000, 13}) {
    // Every write of a shard waits for the disk: few of them.
    const std::vector<int64_t> lengths = some_lengths(shard_tokens == 13 ? 20 : 300, 1);
    const auto num_documents = static_cast<int64_t>(lengths.size());
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    for (const int64_t vocab_size : {60'000, 70'000}) {
      const TokenShards shards(write_shards(folder, lengths, shard_tokens, vocab_size,
                                            std::to_string(shard_tokens) + "-" + std::to_string(vocab_size)));
      ASSERT_EQ(shards.num_tokens(), total);
      ASSERT_EQ(shards.num_documents(), num_documents);
      std::vector<TokenId> all(static_cast<size_t>(total));
      shards.read(0, all);
      for (int64_t i = 0; i < total; ++i) ASSERT_EQ(all[static_cast<size_t>(i)], i + 1);
      int64_t begin = 0;
      for (size_t d = 0; d < lengths.size(); ++d) {
        const TokenShards::Document document = shards.document(static_cast<int64_t>(d));
        ASSERT_EQ(document.begin, begin) << d;
        ASSERT_EQ(document.size(), lengths[d]) << d;
        ASSERT_EQ(document.key, mix_bits(d, 77));
        begin = document.end;
      }
      int64_t next = 7;
      shards.visit_documents(7, [&](int64_t i, const TokenShards::Document& document) {
        EXPECT_EQ(i, next);
        EXPECT_EQ(document.begin, shards.document(i).begin);
        return ++next < num_documents - 1;
      });
      EXPECT_EQ(next, num_documents - 1);
    }
  }
}

TEST(Permutation, IsOneOfAllNumbersAndLooksRandom) {
  for (int64_t size = 1; size < 400; ++size) {
    std::set<int64_t> seen;
    const Permutation order(size, static_cast<uint64_t>(size));
    for (int64_t i = 0; i < size; ++i) seen.insert(order(i));
    ASSERT_EQ(static_cast<int64_t>(seen.size()), size);
    ASSERT_EQ(*seen.rbegin(), size - 1);
  }
  // Where a number lands over many seeds: each of 16 places as often as any other (chi-square, 15 degrees of freedom:
  // above 45 once in 10,000). Neighbours are no nearer each other than any two.
  for (const int64_t size : {2, 3, 5, 17, 1000, 1 << 20}) {
    const int64_t places = std::min<int64_t>(size, 16), trials = 8000;
    std::vector<int64_t> counts(static_cast<size_t>(places));
    double distance = 0;
    for (int64_t seed = 0; seed < trials; ++seed) {
      const Permutation order(size, static_cast<uint64_t>(seed));
      const int64_t at = order(size / 2);
      ++counts[static_cast<size_t>(at * places / size)];
      if (size > 2) distance += std::abs(static_cast<double>(at - order(size / 2 - 1))) / static_cast<double>(size);
    }
    if (size % places == 0 || size > 100) {
      double chi_square = 0;
      const double wanted = static_cast<double>(trials) / static_cast<double>(places);
      for (const int64_t count : counts)
        chi_square += (static_cast<double>(count) - wanted) * (static_cast<double>(count) - wanted) / wanted;
      EXPECT_LT(chi_square, 45) << size;
    }
    if (size > 100) {
      EXPECT_NEAR(distance / static_cast<double>(trials), 1.0 / 3, 0.01) << size;
    }
  }
  const Permutation large(int64_t{1} << 50, 3);
  EXPECT_NE(large(0), large(1));
}

class Sets : public testing::Test {
 protected:
  Sets() : lengths_(some_lengths(2000, 5)), shards_(write_shards(folder_, lengths_, 9973, 1 << 20)) {}
  TemporaryFolder folder_;
  std::vector<int64_t> lengths_;
  TokenShards shards_;
};

TEST_F(Sets, PartsAreAllDocumentsOnceByKeyAndSeed) {
  std::map<uint64_t, std::vector<int64_t>> validation;
  for (const uint64_t seed : {1, 2}) {
    const DocumentSet train(shards_, {Split::kTrain, 0.2, seed}), held(shards_, {Split::kValidation, 0.2, seed}),
        all(shards_, {});
    EXPECT_EQ(train.size() + held.size(), all.size());
    EXPECT_EQ(train.num_tokens() + held.num_tokens(), all.num_tokens());
    EXPECT_EQ(all.size(), std::count_if(lengths_.begin(), lengths_.end(), [](int64_t l) { return l >= 2; }));
    EXPECT_NEAR(static_cast<double>(held.size()) / static_cast<double>(all.size()), 0.2, 0.03);
    for (int64_t i = 0; i < held.size(); ++i) validation[seed].push_back(held.document(i).index);
    // A larger part holds the smaller one.
    const DocumentSet more(shards_, {Split::kValidation, 0.4, seed});
    std::set<int64_t> larger;
    for (int64_t i = 0; i < more.size(); ++i) larger.insert(more.document(i).index);
    for (const int64_t index : validation[seed]) EXPECT_TRUE(larger.contains(index));
  }
  EXPECT_NE(validation[1], validation[2]);
}

TEST_F(Sets, FindByNumberAndByToken) {
  for (const DocumentSetOptions& options : {DocumentSetOptions{}, DocumentSetOptions{Split::kTrain, 0.3, 9},
                                            DocumentSetOptions{Split::kValidation, 0.02, 9, 30}}) {
    const DocumentSet set(shards_, options);
    int64_t position = 0, last = -1;
    for (int64_t i = 0; i < set.size(); ++i) {
      const DocumentSet::Document document = set.document(i);
      EXPECT_GT(document.index, last);
      EXPECT_GE(document.size(), options.min_tokens);
      ASSERT_EQ(document.position, position);
      for (const int64_t at : {position, position + document.size() - 1}) {
        ASSERT_EQ(set.document_at(at).index, document.index) << at;
        ASSERT_EQ(set.document_at(at).position, position);
      }
      position += document.size();
      last = document.index;
    }
    EXPECT_EQ(position, set.num_tokens());
  }
  EXPECT_THROW(DocumentSet(shards_, {Split::kTrain, 1.0}), UsageError);
  EXPECT_THROW(DocumentSet(shards_, {Split::kTrain, std::nan("")}), UsageError);
  EXPECT_THROW(DocumentSet(shards_, {.min_tokens = 1}), UsageError);
  expect_refused([&] { DocumentSet(shards_, {Split::kValidation, 0.0}); }, {"validation", "found none among 2000"});
  expect_refused([&] { DocumentSet(shards_, {.min_tokens = 501}); }, {"501 tokens"});
}

// The rows' content checked against the shards; `seen` counts tokens by position.
void check_batch(const PackedBatch& batch, const TokenShards& shards, const std::set<int64_t>& begins, int64_t seqlen,
                 std::vector<int64_t>& seen) {
  int64_t targets = 0;
  for (size_t c = 0; c + 1 < batch.cu_seqlens.size(); ++c) {
    const auto begin = static_cast<size_t>(batch.cu_seqlens[c]), end = static_cast<size_t>(batch.cu_seqlens[c + 1]);
    ASSERT_LT(begin, end);
    ASSERT_EQ(begin / static_cast<size_t>(seqlen), (end - 1) / static_cast<size_t>(seqlen))
        << "a stretch stays in its row";
    for (size_t i = begin; i < end; ++i) {
      if (batch.ids[begin] == 0) {  // padding
        ASSERT_EQ(batch.ids[i], 0);
        ASSERT_EQ(batch.targets[i], kIgnoredTarget);
        continue;
      }
      ASSERT_EQ(batch.ids[i], batch.ids[begin] + static_cast<TokenId>(i - begin));
      const bool is_last = begins.contains(batch.ids[i]) || batch.ids[i] == shards.num_tokens();
      ASSERT_EQ(batch.targets[i], is_last ? kIgnoredTarget : batch.ids[i] + 1);
      ASSERT_TRUE(!is_last || i + 1 == end) << "nothing goes over a document's end";
      targets += !is_last;
      ++seen[static_cast<size_t>(batch.ids[i] - 1)];
    }
  }
  EXPECT_EQ(targets, batch.num_targets);
}

TEST_F(Sets, PackedRowsTakeEveryTokenOnceAnEpochAndNoTargetOfAnotherDocument) {
  std::set<int64_t> begins;
  for (int64_t i = 0; i < shards_.num_documents(); ++i) begins.insert(shards_.document(i).begin);
  for (const bool shuffle : {true, false}) {
    for (const int64_t seqlen : {1, 7, 64, 1024, 100'000}) {
      const DocumentSet train(shards_, {Split::kTrain, 0.3, 4});
      const PackedRows rows(train, {seqlen, 11, shuffle});
      std::vector<std::vector<TokenId>> epochs;
      for (int64_t epoch = 0; epoch < 2; ++epoch) {
        std::vector<int64_t> seen(static_cast<size_t>(shards_.num_tokens()));
        PackedBatch batch;
        std::vector<TokenId> order;
        for (int64_t row = 0; row < rows.rows_per_epoch();) {
          const int64_t count = std::min<int64_t>(3, rows.rows_per_epoch() - row);
          rows.read(epoch * rows.rows_per_epoch() + row, count, batch);
          ASSERT_EQ(static_cast<int64_t>(batch.ids.size()), count * seqlen);
          ASSERT_EQ(batch.targets.size(), batch.ids.size());
          check_batch(batch, shards_, begins, seqlen, seen);
          if (HasFatalFailure()) return;
          order.insert(order.end(), batch.ids.begin(), batch.ids.end());
          row += count;
        }
        for (int64_t i = 0; i < train.size(); ++i) {
          const DocumentSet::Document document = train.document(i);
          for (int64_t t = document.begin; t < document.end; ++t) ASSERT_EQ(seen[static_cast<size_t>(t)], 1) << t;
        }
        ASSERT_EQ(std::accumulate(seen.begin(), seen.end(), int64_t{0}), train.num_tokens());
        epochs.push_back(order);
      }
      EXPECT_EQ(epochs[0] == epochs[1], !shuffle);
    }
  }
}

TEST_F(Sets, PackedRowsAreFoundFromTheirNumber) {
  const DocumentSet train(shards_, {Split::kTrain, 0.3, 4});
  const PackedRows rows(train, {100, 11}), same(train, {100, 11}), other(train, {100, 12});
  PackedBatch one, two;
  rows.read(5, 4, one);
  for (const int64_t row : {8, 5, 7, 6}) {
    same.read(row, 1, two);
    for (size_t i = 0; i < 100; ++i) {
      ASSERT_EQ(two.ids[i], one.ids[static_cast<size_t>(row - 5) * 100 + i]);
      ASSERT_EQ(two.targets[i], one.targets[static_cast<size_t>(row - 5) * 100 + i]);
    }
  }
  other.read(5, 4, two);
  EXPECT_NE(one.ids, two.ids);
  EXPECT_THROW(rows.read(-1, 1, one), UsageError);
  EXPECT_THROW(rows.read(0, 0, one), UsageError);
  EXPECT_THROW(PackedRows(train, {0}), UsageError);
}

TEST_F(Sets, ChunksAreWholeDocumentsInOrder) {
  for (const bool shuffle : {true, false}) {
    for (const auto& [chunk, batch_size] : {std::pair<int64_t, int64_t>{16, 3}, {64, 1}, {1, 5}, {1000, 4}}) {
      const DocumentSet train(shards_, {Split::kTrain, 0.5, 4});
      DocumentChunks chunks(train, {chunk, batch_size, 21, shuffle, 2});
      std::vector<std::pair<int64_t, int64_t>> at(static_cast<size_t>(batch_size), {-1, 0});  // document, tokens so far
      std::vector<int64_t> finished, begun;
      ChunkBatch batch;
      int64_t step = 0, targets = 0;
      for (; chunks.read(step, batch); ++step) {
        for (size_t r = 0; r < at.size(); ++r) {
          if (batch.num_tokens[r] == 0) {
            ASSERT_EQ(batch.document[r], -1);
            continue;
          }
          if (batch.is_reset[r]) {
            begun.push_back(batch.document[r]);
            at[r] = {batch.document[r], 0};
          }
          ASSERT_EQ(batch.document[r], at[r].first);
          ASSERT_EQ(batch.offset[r], at[r].second);
          const TokenShards::Document document = shards_.document(batch.document[r]);
          for (int64_t i = 0; i < chunk; ++i) {
            const auto where = r * static_cast<size_t>(chunk) + static_cast<size_t>(i);
            const bool counts = i < batch.num_tokens[r];
            ASSERT_EQ(batch.ids[where], counts ? document.begin + at[r].second + i + 1 : 0);
            ASSERT_EQ(batch.targets[where], counts ? document.begin + at[r].second + i + 2 : kIgnoredTarget);
          }
          targets += batch.num_tokens[r];
          at[r].second += batch.num_tokens[r];
          ASSERT_LT(at[r].second, document.size());
          if (at[r].second == document.size() - 1) {
            finished.push_back(batch.document[r]);
          } else {
            ASSERT_EQ(batch.num_tokens[r], chunk) << "only a document's last chunk is short";
          }
        }
      }
      EXPECT_EQ(step, chunks.num_steps());
      EXPECT_EQ(targets, 2 * (train.num_tokens() - train.size()));
      ASSERT_EQ(finished.size(), static_cast<size_t>(2 * train.size()));
      ASSERT_EQ(begun.size(), finished.size());
      // An epoch's documents are all begun before the next one's, each once, in two orders.
      const std::vector<int64_t> first(begun.begin(), begun.begin() + train.size()),
          second(begun.begin() + train.size(), begun.end());
      EXPECT_EQ(std::set<int64_t>(first.begin(), first.end()).size(), first.size());
      EXPECT_EQ(std::set<int64_t>(second.begin(), second.end()).size(), second.size());
      EXPECT_EQ(first == second, !shuffle);
      EXPECT_EQ(std::is_sorted(first.begin(), first.end()), !shuffle);
    }
  }
}

TEST_F(Sets, ChunksGoOnFromAnyStep) {
  const DocumentSet train(shards_, {Split::kTrain, 0.1, 4});
  DocumentChunks straight(train, {32, 4, 3}), jumping(train, {32, 4, 3});
  std::vector<ChunkBatch> wanted(3000);
  for (size_t step = 0; step < wanted.size(); ++step)
    ASSERT_TRUE(straight.read(static_cast<int64_t>(step), wanted[step]));
  std::mt19937 rng(8);
  for (int i = 0; i < 200; ++i) {
    const auto step = static_cast<size_t>(rng() % wanted.size());
    ChunkBatch batch;
    if (i % 2 == 0) {
      DocumentChunks(train, {32, 4, 3}).read(static_cast<int64_t>(step), batch);
    } else {
      jumping.read(static_cast<int64_t>(step), batch);
    }
    ASSERT_EQ(batch.ids, wanted[step].ids) << step;
    ASSERT_EQ(batch.targets, wanted[step].targets) << step;
    ASSERT_EQ(batch.is_reset, wanted[step].is_reset) << step;
    ASSERT_EQ(batch.document, wanted[step].document) << step;
  }
  ChunkBatch batch;
  EXPECT_THROW(straight.read(-1, batch), UsageError);
  EXPECT_THROW(straight.num_steps(), UsageError);
  EXPECT_THROW(DocumentChunks(train, {0, 1}), UsageError);
  EXPECT_THROW(DocumentChunks(train, {16, 0}), UsageError);
}

// Overwrites bytes of a file.
void damage(const std::string& path, int64_t at, std::string_view bytes) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(at);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

TEST(DamagedShards, AreRefusedByName) {
  const TemporaryFolder folder;
  int count = 0;
  const auto fresh = [&] { return write_shards(folder, {10, 20, 30, 40}, 50, 30000, std::to_string(count++)); };
  const auto number = [](auto value) { return std::string(reinterpret_cast<const char*>(&value), sizeof(value)); };
  const auto after = [&](int64_t at, const std::string& bytes) {
    const std::string path = fresh();
    damage(path + "/s1", at, bytes);
    return path;
  };
  expect_refused([&] { TokenShards(after(0, "GGUF")); }, {"s1", "token shard", "GGUF"});
  expect_refused([&] { TokenShards(after(8, number(uint32_t{2}))); }, {"s1", "version 1", "2"});
  expect_refused([&] { TokenShards(after(12, number(uint32_t{4}))); }, {"s1", "4 bytes a token"});
  expect_refused([&] { TokenShards(after(16, number(int64_t{20000}))); }, {"s1", "tokenizer"});
  expect_refused([&] { TokenShards(after(24, number(int64_t{49}))); }, {"s1", "50 tokens", "found 49"});
  expect_refused([&] { TokenShards(after(24, number(int64_t{-1}))); }, {"s1", "-1 tokens"});
  expect_refused([&] { TokenShards(after(24, number(INT64_MAX))); }, {"s1", "tokens"});
  expect_refused([&] { TokenShards(after(32, number(int64_t{1} << 60))); }, {"s1", "documents"});
  expect_refused([&] { TokenShards(after(40, "b")); }, {"s1", "tokenizer", "baaa"});
  for (const int64_t size : {0, 5, 127, 128, 200}) {
    const std::string path = fresh();
    std::filesystem::resize_file(path + "/s1", static_cast<uint64_t>(size));
    expect_refused([&] { TokenShards{path}; }, {"s1"});
  }
  std::string path = fresh();
  std::filesystem::remove(path + "/s0");
  expect_refused([&] { TokenShards{path}; }, {"s0", "No such file"});

  // What opening does not look at is seen when it is read, or by verify().
  path = after(128 + 8, number(uint16_t{30000}));
  const auto agree = [](int64_t) { return true; };
  {
    const TokenShards shards(path);
    std::vector<TokenId> ids(100);
    expect_refused([&] { shards.read(0, ids); }, {"s1", "below 30000", "found 30000"});
    expect_refused([&] { shards.verify(agree); }, {"s1", "sha256", "manifest.json"});
  }
  path = after(128 + 100 + 4, number(int64_t{51}));  // where document 3 begins: the only one that begins in s1
  expect_refused([&] { TokenShards(path).document(3); }, {"s1", "document 0", "51"});
  TokenShards(fresh()).verify(agree);
}

TEST(DamagedShards, ManifestsAreRefusedByName) {
  const TemporaryFolder folder;
  const std::string path = write_shards(folder, {10, 20}, 50, 30000);
  const auto with = [&](const std::function<void(json&)>& edit) {
    std::ifstream in(path + "/manifest.json");
    json manifest = json::parse(in);
    edit(manifest);
    const std::string other = folder.file("other");
    std::filesystem::remove_all(other);
    std::filesystem::copy(path, other);
    std::ofstream(other + "/manifest.json") << manifest.dump();
    return other;
  };
  expect_refused([&] { TokenShards(folder.file("none")); }, {"none", "sparsek tokenize"});
  expect_refused([&] { TokenShards(with([](json& m) { m["format"] = "sparsek-shards-9"; })); },
                 {"manifest.json", "sparsek-shards-9"});
  expect_refused([&] { TokenShards(with([](json& m) { m["tokens"] = 31; })); }, {"manifest.json", "31"});
  expect_refused([&] { TokenShards(with([](json& m) { m.erase("shards"); })); }, {"manifest.json", "damaged"});
  expect_refused([&] { TokenShards(with([](json& m) { m["shards"][0]["tokens"] = "x"; })); },
                 {"manifest.json", "damaged"});
  expect_refused([&] { TokenShards(with([](json& m) { m["shards"][0]["file"] = "../shards/s0"; })); },
                 {"manifest.json", "../"});
  expect_refused([&] { TokenShards(with([](json& m) { m["shards"] = json::array(); })); }, {"30 tokens", "found 0"});
  std::filesystem::create_directories(folder.file("begun/progress"));
  folder.write("begun/progress/job.json", "{}");
  expect_refused([&] { TokenShards(folder.file("begun")); }, {"begun", "ended early", "again"});
}

}  // namespace
}  // namespace sparsek
