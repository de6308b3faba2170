// The reading side of a corpus by itself: JSON lines against another parser, lines and documents cut anywhere, readers
// that go on in the middle, and the plan. Whole runs: tests/python/test_tokenize.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "data/corpus/document_reader.h"
#include "data/corpus/inputs.h"
#include "data/corpus/json_line.h"
#include "data/text_reader.h"
#include "data/tokenizer.h"
#include "data/utf8.h"
#include "tests/data/support.h"

namespace sparsek {
namespace {

using nlohmann::json;
using test::expect_refused;
using test::TemporaryFolder;

// What a line holds, or nothing when it is refused.
std::optional<std::string> text_of(std::string_view line, std::mt19937* rng = nullptr) {
  JsonLine parser("text");
  std::string text;
  while (!line.empty()) {
    const size_t size = rng != nullptr ? std::min<size_t>(1 + (*rng)() % 5, line.size()) : line.size();
    if (parser.push(line.substr(0, size), text)) return std::nullopt;
    line.remove_prefix(size);
  }
  const JsonLine::End end = parser.finish();
  if (end.problem || end.content == JsonLine::Content::kBlank) return std::nullopt;
  return text;
}

// The same by nlohmann's parser; repeated outer keys count as wrong there only for the field.
std::optional<std::string> wanted_text(const std::string& line) {
  int fields = 0;
  const json value = json::parse(
      line,
      [&fields](int depth, json::parse_event_t event, json& parsed) {
        if (depth == 1 && event == json::parse_event_t::key && parsed == "text") ++fields;
        return true;
      },
      /*allow_exceptions=*/false);
  if (value.is_discarded() || !value.is_object() || fields != 1 || !value.at("text").is_string()) return std::nullopt;
  return value.at("text").get<std::string>();
}

TEST(JsonLine, AgreesWithAnotherParserOnLinesWithMistakes) {
  const std::vector<std::string> seeds = {
      R"({"text": "plain", "n": [1, -0.5e+3, 0, 12.25E-2, true, false, null, {}, [], {"text": "inner"}]})",
      R"( {"a": {"b": [[], {"c": "\"\\\/\b\f\n\r\t\u00e9\u20AC\ud83d\ude00"}]}, "text": "\u0041\u00e9\u20ac\ud83d\ude00\"\\\/\b\f\n\r\t"} )",
      R"({"text":""})",
      R"({"te\u0078t":"escaped key","texts":1,"tex":"","":"x"})",
      R"({"text": "é € 😀 \u0000"})",
      R"({"text": "a", "text": "b"})",
  };
  const std::string letters = "{}[]\",:\\ue0123456789.-+EtrufalsnN \tdD8";
  std::mt19937 rng(2406);
  int accepted = 0, refused = 0;
  for (int i = 0; i < 200'000; ++i) {
    std::string line = seeds[static_cast<size_t>(i) % seeds.size()];
    for (uint32_t edits = rng() % 3; edits > 0; --edits) {
      const size_t at = rng() % line.size();
      const char letter = letters[rng() % letters.size()];
      switch (rng() % 3) {
        case 0:
          line[at] = letter;
          break;
        case 1:
          line.insert(at, 1, letter);
          break;
        default:
          line.erase(at, 1);
      }
      if (line.empty()) line = " ";
    }
    const std::optional<std::string> wanted = wanted_text(line), found = text_of(line);
    // It refuses bytes that are not UTF-8 and half surrogate pairs, which pass here: the next test looks at those.
    if (!wanted && found && (utf8_valid_prefix(line) < line.size() || line.find("\\u") != line.npos)) continue;
    ASSERT_EQ(found, wanted) << line;
    ASSERT_EQ(text_of(line, &rng), wanted) << line;
    ++(wanted ? accepted : refused);
  }
  EXPECT_GT(accepted, 30'000);
  EXPECT_GT(refused, 30'000);
}

TEST(JsonLine, HalfSurrogatePairsAndBytesThatAreNotUtf8) {
  const std::string bad = "\xef\xbf\xbd";
  EXPECT_EQ(text_of(R"({"text": "a\ud83db"})"), "a" + bad + "b");
  EXPECT_EQ(text_of(R"({"text": "\ud83d"})"), bad);
  EXPECT_EQ(text_of(R"({"text": "\ude00\ud83d\n"})"), bad + bad + "\n");
  EXPECT_EQ(text_of(R"({"text": "\ud83d\ud83d\ude00"})"), bad + "\xf0\x9f\x98\x80");
  EXPECT_EQ(text_of("{\"text\": \"\xff\xc3\"}"), "\xff\xc3");
  EXPECT_EQ(text_of("{\"text\xff\": 1, \"text\": \"x\"}"), "x");
}

TEST(JsonLine, NestsSixtyFourDeepAndNoMore) {
  const auto nested = [](size_t depth) {
    return R"({"a": )" + std::string(depth, '[') + std::string(depth, ']') + R"(, "text": "x"})";
  };
  EXPECT_EQ(text_of(nested(63)), "x");
  EXPECT_EQ(text_of(nested(64)), std::nullopt);
}

struct Found {
  std::vector<std::string> documents;
  std::vector<InputRecord> records;
};

// All documents of the units in order; `positions` gets where each piece begins.
Found read_units(const std::vector<InputFile>& files, const std::vector<WorkUnit>& units,
                 std::vector<std::pair<WorkUnit, DocumentPiece::Position>>* positions = nullptr) {
  Found found;
  std::atomic<int64_t> done = 0;
  for (const WorkUnit& unit : units) {
    DocumentReader reader(files, unit, {.field = "text", .skip_bad_lines = true}, done);
    DocumentPiece piece;
    while (reader.next(piece)) {
      EXPECT_LE(piece.text.size(), DocumentReader::kPieceBytes);
      EXPECT_TRUE(piece.is_last || piece.text.size() == DocumentReader::kPieceBytes);
      if (piece.is_first) found.documents.emplace_back();
      found.documents.back() += piece.text;
      if (positions != nullptr) positions->emplace_back(unit, piece.position);
    }
    for (InputRecord& record : reader.take_records()) found.records.push_back(std::move(record));
  }
  return found;
}

class Documents : public testing::Test {
 protected:
  // Lines of many lengths, some bad, some blank, some far longer than a piece.
  Documents() {
    std::mt19937 rng(7);
    std::string lines;
    for (int i = 0; i < 400; ++i) {
      const size_t size = i % 97 == 5 ? 200'000 : i % 50 == 3 ? 0 : rng() % 900;
      std::string text;
      while (text.size() < size) text += static_cast<char>('a' + rng() % 26);
      if (i % 31 == 7) {
        lines += R"({"text": "bad)" + text + "\n";
        continue;
      }
      wanted_.push_back(text);
      lines += json{{"id", i}, {"text", text}}.dump() + (i % 11 == 2 ? "\r\n\n" : "\n");
    }
    folder_.write("a.jsonl", lines);
    for (const size_t size : {size_t{0}, size_t{1}, DocumentReader::kPieceBytes, 3 * DocumentReader::kPieceBytes + 5}) {
      wanted_.push_back(std::string(size, 'x'));
      folder_.write("b" + std::to_string(wanted_.size()) + ".txt", wanted_.back());
    }
    files_ = find_inputs({{folder_.file("")}, {}});
  }
  TemporaryFolder folder_;
  std::vector<std::string> wanted_;
  std::vector<InputFile> files_;
};

TEST_F(Documents, AreTheSameHoweverTheWorkIsCut) {
  for (const int64_t shard_bytes : {1 << 30, 300'000, 10'000, 997, 64}) {
    const std::vector<WorkUnit> units = plan_units(files_, shard_bytes);
    const Found found = read_units(files_, units);
    ASSERT_EQ(found.documents, wanted_) << shard_bytes;
    int64_t documents = 0, empty = 0, skipped = 0, bytes = 0;
    for (const InputRecord& record : found.records) {
      documents += record.documents;
      empty += record.empty_documents;
      skipped += record.skipped_lines;
      bytes += record.end - record.begin;
      EXPECT_EQ(record.sha256.size(), 64u);
    }
    EXPECT_EQ(documents + empty, static_cast<int64_t>(wanted_.size()));
    EXPECT_EQ(empty, std::count(wanted_.begin(), wanted_.end(), ""));
    EXPECT_EQ(skipped, 13);
    int64_t total = 0;
    for (const InputFile& file : files_) total += file.size_bytes;
    EXPECT_EQ(bytes, total);
  }
}

TEST_F(Documents, AReaderGoesOnFromEveryPiece) {
  for (const int64_t shard_bytes : {1 << 30, 150'000}) {
    const std::vector<WorkUnit> units = plan_units(files_, shard_bytes);
    std::vector<std::pair<WorkUnit, DocumentPiece::Position>> positions;
    const Found whole = read_units(files_, units, &positions);
    for (size_t i = 0; i < positions.size(); i += i < 60 ? 1 : 7) {
      const auto& [unit, position] = positions[i];
      std::atomic<int64_t> done = 0;
      DocumentReader reader(files_, unit, {.field = "text", .skip_bad_lines = true}, done, position);
      DocumentPiece piece;
      for (size_t j = i; j < positions.size() && positions[j].first.first_file == unit.first_file &&
                         positions[j].first.begin == unit.begin;
           ++j) {
        ASSERT_TRUE(reader.next(piece)) << i << " " << j;
        EXPECT_EQ(piece.position.document_offset, positions[j].second.document_offset);
        EXPECT_EQ(piece.position.text_bytes, positions[j].second.text_bytes);
        EXPECT_EQ(piece.is_first, positions[j].second.text_bytes == 0);
        EXPECT_EQ(piece.position.record.documents, positions[j].second.record.documents);
        if (j > i + 20) break;
      }
    }
  }
}

TEST(Inputs, PlanKeepsOrderAndSize) {
  const auto file = [](int64_t size_bytes, InputFormat format, bool is_gzip = false) {
    return InputFile{"f", size_bytes, 0, format, is_gzip};
  };
  const std::vector<InputFile> files = {file(40, InputFormat::kText),       file(60, InputFormat::kJsonLines),
                                        file(1, InputFormat::kText),        file(500, InputFormat::kText),
                                        file(250, InputFormat::kJsonLines), file(20, InputFormat::kText, true),
                                        file(20, InputFormat::kText),       file(1, InputFormat::kText)};
  std::string plan;
  for (const WorkUnit& unit : plan_units(files, 100)) {
    plan += fmt::format("{}-{} {}..{}; ", unit.first_file, unit.end_file, unit.begin, unit.end);
  }
  EXPECT_EQ(plan, "0-2 0..-1; 2-3 0..-1; 3-4 0..-1; 4-5 0..100; 4-5 100..200; 4-5 200..250; 5-7 0..-1; 7-8 0..-1; ");
}

TEST(Inputs, RefusalsNameThePath) {
  const TemporaryFolder folder;
  folder.write("a.exe", "x");
  expect_refused([&] { find_inputs({{folder.file("none.txt")}, {}}); }, {"none.txt", "No such file"});
  expect_refused([&] { find_inputs({{folder.file("a.exe")}, {}}); }, {"a.exe", ".jsonl", "--suffix"});
  expect_refused([&] { find_inputs({{folder.file("")}, {}}); }, {".jsonl", "none"});
  EXPECT_EQ(find_inputs({{folder.file("")}, {".exe"}}).size(), 1u);
}

std::string tiny_tokenizer(bool has_nfc) {
  json vocab;
  for (int i = 0; i < 256; ++i) {
    // GPT-2's alphabet in the order of its code points, which is enough for ids that differ.
    const bool plain = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
    const int code = plain ? i : 256 + i;
    std::string text;
    if (code < 0x80) {
      text = static_cast<char>(code);
    } else {
      text += static_cast<char>(0xc0 | code >> 6);
      text += static_cast<char>(0x80 | (code & 0x3f));
    }
    vocab[text] = i;
  }
  vocab["th"] = 256;
  vocab["the"] = 257;
  json value{{"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"t h", "th e"}}}},
             {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
             {"decoder", {{"type", "ByteLevel"}}},
             {"added_tokens", json::array({{{"id", 258}, {"content", "<|end|>"}, {"special", true}}})}};
  if (has_nfc) value["normalizer"] = {{"type", "NFC"}};
  return value.dump();
}

TEST(EncoderSave, GoesOnWhereAnotherStood) {
  for (const bool has_nfc : {false, true}) {
    const Tokenizer tokenizer = Tokenizer::from_json(tiny_tokenizer(has_nfc), "", "tiny");
    const std::string text = "the thethe  cafe\u0301 \u1100\u1161\u11a8<|end|>the<|en\xff the\xe2\x82 12345 " +
                             std::string(300, 'a') + "e\u0301\u0302\u0303 <|end|>";
    const std::vector<TokenId> wanted = tokenizer.encode(text, SpecialTokens::kParse);
    for (size_t cut = 0; cut <= text.size(); ++cut) {
      Encoder first(tokenizer, SpecialTokens::kParse), second(tokenizer, SpecialTokens::kParse);
      std::vector<TokenId> ids;
      first.push(std::string_view(text).substr(0, cut), ids);
      second.restore(first.save());
      EXPECT_EQ(second.save(), first.save());
      second.push(std::string_view(text).substr(cut), ids);
      second.finish(ids);
      ASSERT_EQ(ids, wanted) << cut << " " << has_nfc;
      second.push(text, ids);  // as new
      second.finish(ids);
      EXPECT_EQ(ids.size(), 2 * wanted.size());
    }
    Encoder encoder(tokenizer, SpecialTokens::kParse);
    const std::string empty = encoder.save();
    for (const std::string& saved : {std::string(), empty.substr(1), empty + "x", std::string(16, '\xff')}) {
      expect_refused([&] { encoder.restore(saved); }, {"saved encoder"});
    }
  }
}

TEST(Fingerprint, ChangesWithWhatDecidesIds) {
  const auto fingerprint = [](const std::string& text) { return Tokenizer::from_json(text, "", "t").fingerprint(); };
  const std::string plain = tiny_tokenizer(false);
  EXPECT_EQ(fingerprint(plain).size(), 64u);
  EXPECT_EQ(fingerprint(plain), fingerprint(plain));
  EXPECT_NE(fingerprint(plain), fingerprint(tiny_tokenizer(true)));
  json changed = json::parse(plain);
  changed["model"]["merges"] = {"th e", "t h"};
  EXPECT_NE(fingerprint(plain), fingerprint(changed.dump()));
  changed = json::parse(plain);
  changed["added_tokens"][0]["content"] = "<|stop|>";
  EXPECT_NE(fingerprint(plain), fingerprint(changed.dump()));
}

TEST(ReadText, AllOfItOrAnErrorWithItsName) {
  const TemporaryFolder folder;
  for (const size_t size : {0, 1, 65535, 65536, 65537, 300000}) {
    const std::string text(size, 'x');
    EXPECT_EQ(read_text(folder.write("text", text)), text);
  }
  expect_refused([&] { read_text(folder.file(".")); }, {folder.file("."), "found a directory"});
  expect_refused([&] { read_text(folder.file("none")); }, {folder.file("none"), "cannot open", "No such file"});
}

}  // namespace
}  // namespace sparsek
