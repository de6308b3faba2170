// GGUF reader: what it reads, and that each kind of damage ends in one line naming the file and the fault.
#include "data/gguf.h"

#include <gtest/gtest.h>

#include "tests/data/support.h"

namespace sparsek {
namespace {

using test::Bytes;
using test::expect_refused;

void expect_file_refused(const Bytes& bytes, std::initializer_list<std::string_view> words) {
  expect_refused([&] { GgufFile::from_bytes(bytes.span(), "model.gguf"); }, words);
  expect_refused([&] { GgufFile::from_bytes(bytes.span(), "model.gguf"); }, {"model.gguf"});
}

// Two tensors, five values.
Bytes good_file() {
  Bytes bytes;
  bytes.header(2, 5).uint32("answer", 42).text("name", "tiny").texts("words", {"a", "", "ccc"});
  bytes.string("ratio").put<uint32_t>(6).put(0.5f);
  bytes.string("wide").put<uint32_t>(10).put<uint64_t>(~uint64_t{0});
  bytes.tensor("second", {4}, 0, 96).tensor("first", {32, 2}, 3, 0).pad(32);
  bytes.raw(std::string(40, 'q')).pad(32).pad(96 + 32);
  for (int i = 0; i < 28; ++i) bytes.put(1.5f);
  return bytes;
}

TEST(Gguf, ReadsMetadataAndTensors) {
  const Bytes bytes = good_file();
  const GgufFile file = GgufFile::from_bytes(bytes.span(), "model.gguf");
  EXPECT_EQ(file.get_int("answer"), 42);
  EXPECT_EQ(file.get_float("answer"), 42.0);
  EXPECT_EQ(file.get_float("ratio"), 0.5);
  EXPECT_EQ(file.get_string("name"), "tiny");
  EXPECT_EQ(file.get_strings("words"), (std::vector<std::string_view>{"a", "", "ccc"}));
  EXPECT_EQ(file.keys(), (std::vector<std::string_view>{"answer", "name", "words", "ratio", "wide"}));
  EXPECT_FALSE(file.find_int("absent").has_value());
  ASSERT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.tensor("first").shape, (std::vector<int64_t>{2, 32}));
  EXPECT_EQ(file.tensor("first").type, WeightType::kQ4_1);
  EXPECT_EQ(file.tensor("first").bytes.size(), 40u);
  EXPECT_EQ(file.tensor("first").bytes[39], 'q');
  EXPECT_EQ(file.tensor("second").bytes.size(), 16u);
  EXPECT_EQ(file.tensor("second").bytes.data() - file.tensor("first").bytes.data(), 96);
  EXPECT_EQ(file.find_tensor("third"), nullptr);
}

TEST(Gguf, NamesAbsentAndMistypedMetadata) {
  const Bytes bytes = good_file();
  const GgufFile file = GgufFile::from_bytes(bytes.span(), "model.gguf");
  expect_refused([&] { file.get_int("absent"); }, {"model.gguf", "'absent'"});
  expect_refused([&] { file.get_int("name"); }, {"'name'", "integer", "string"});
  expect_refused([&] { file.get_int("wide"); }, {"'wide'", "uint64"});
  expect_refused([&] { file.get_bool("answer"); }, {"'answer'", "bool", "uint32"});
  expect_refused([&] { file.get_string("words"); }, {"'words'", "array of string"});
  expect_refused([&] { file.get_ints("words"); }, {"'words'", "integers", "array of string"});
  expect_refused([&] { file.get_floats("answer"); }, {"'answer'", "array", "uint32"});
  expect_refused([&] { file.get_strings("answer"); }, {"'answer'", "array", "uint32"});
  expect_refused([&] { file.tensor("third"); }, {"'third'"});
}

TEST(Gguf, EveryTruncationIsRefused) {
  const Bytes bytes = good_file();
  const size_t data_end = bytes.span().size() - 28 * sizeof(float);  // up to the end of the last tensor
  for (size_t size = 0; size < data_end; ++size) {
    EXPECT_THROW(GgufFile::from_bytes(bytes.span().first(size), "model.gguf"), DataError) << size;
  }
}

TEST(Gguf, FilesThatCannotBeOpened) {
  const test::TemporaryFolder folder;
  expect_refused([&] { GgufFile(folder.file("none.gguf")); }, {"none.gguf", "No such file"});
  expect_refused([&] { GgufFile(folder.write("empty.gguf", "")); }, {"empty.gguf", "empty"});
  expect_refused([&] { GgufFile(folder.file("")); }, {"directory"});
  expect_refused([&] { GgufFile(folder.write("text.gguf", "hello")); }, {"text.gguf", "'GGUF'", "'hell'"});
}

TEST(Gguf, WrongHeaders) {
  expect_file_refused(Bytes().raw("GGUF"), {"truncated", "version"});
  expect_file_refused(Bytes().header(0, 0, 2), {"version 3", "version 2"});
  expect_file_refused(Bytes().header(0, 0, 0x03000000), {"big-endian"});
}

// Counts and sizes as large as their type, where a reader would allocate or wrap.
TEST(Gguf, AbsurdCounts) {
  for (const uint64_t count : {uint64_t{1} << 20, uint64_t{1} << 32, uint64_t{1} << 61, ~uint64_t{0}}) {
    expect_file_refused(Bytes().header(count, 0), {"tensor count", std::to_string(count)});
    expect_file_refused(Bytes().header(0, count), {"metadata count", std::to_string(count)});
    expect_file_refused(Bytes().header(0, 1).put(count).raw("key and more bytes"), {"truncated", "metadata key"});
    expect_file_refused(Bytes().header(0, 1).string("k").put<uint32_t>(8).put(count), {"truncated", "string"});
    for (const uint32_t element : {0u, 5u, 8u, 12u}) {
      expect_file_refused(Bytes().header(0, 1).string("k").put<uint32_t>(9).put(element).put(count),
                          {"array's length", std::to_string(count)});
    }
    expect_file_refused(Bytes().header(1, 0).tensor("t", {count, count}, 0, 0), {"'t'"});
    expect_file_refused(Bytes().header(1, 0).tensor("t", {32}, 0, count & ~uint64_t{31}), {"'t'"});
  }
}

TEST(Gguf, WrongMetadata) {
  expect_file_refused(Bytes().header(0, 1).string("k").put<uint32_t>(13).put<uint64_t>(0), {"'k'", "13"});
  expect_file_refused(Bytes().header(0, 1).string("k").put<uint32_t>(9).put<uint32_t>(9).put<uint64_t>(0),
                      {"'k'", "array"});
  expect_file_refused(Bytes().header(0, 2).uint32("k", 1).uint32("k", 1), {"'k'", "twice"});
  for (const uint32_t alignment : {0u, 4u, 33u, 48u, 1u << 21}) {
    expect_file_refused(Bytes().header(0, 1).uint32("general.alignment", alignment),
                        {"general.alignment", std::to_string(alignment)});
  }
  expect_file_refused(Bytes().header(0, 1).text("general.alignment", "32"), {"general.alignment", "string"});
  expect_file_refused(Bytes().header(0, 2).uint32("a\nb\x01", 1).uint32("a\nb\x01", 1), {"'a\\x0ab\\x01'"});
}

TEST(Gguf, WrongTensors) {
  const auto refused = [](const Bytes& infos, std::initializer_list<std::string_view> words) {
    Bytes bytes = infos;
    bytes.pad(32).raw(std::string(256, '\0'));
    expect_file_refused(bytes, words);
  };
  refused(Bytes().header(1, 0).tensor("t", {}, 0, 0), {"'t'", "dimensions", "0"});
  refused(Bytes().header(1, 0).tensor("t", {1, 1, 1, 1, 1}, 0, 0), {"'t'", "dimensions", "5"});
  refused(Bytes().header(1, 0).tensor("t", {0}, 0, 0), {"'t'", "dimension 0"});
  refused(Bytes().header(1, 0).tensor("t", {32}, 6, 0), {"'t'", "Q5_0"});
  refused(Bytes().header(1, 0).tensor("t", {32}, 4, 0), {"'t'", "unknown type 4"});
  refused(Bytes().header(1, 0).tensor("t", {32}, 99, 0), {"'t'", "unknown type 99"});
  refused(Bytes().header(1, 0).tensor("t", {33}, 8, 0), {"'t'", "multiple of 32", "[33]"});
  refused(Bytes().header(1, 0).tensor("t", {8}, 0, 16), {"'t'", "aligned to 32", "16"});
  refused(Bytes().header(1, 0).tensor("t", {8}, 0, 256), {"'t'", "288", "256"});
  refused(Bytes().header(1, 0).tensor("t", {65}, 0, 0), {"'t'", "260", "256"});
  refused(Bytes().header(2, 0).tensor("t", {8}, 0, 0).tensor("t", {8}, 0, 32), {"'t'", "twice"});
  refused(Bytes().header(2, 0).tensor("s", {9}, 0, 0).tensor("t", {8}, 0, 32), {"'s'", "'t'", "overlap"});
  refused(Bytes().header(2, 0).tensor("s", {8}, 0, 0).tensor("t", {8}, 0, 0), {"'s'", "'t'", "overlap"});
}

}  // namespace
}  // namespace sparsek
