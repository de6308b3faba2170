// safetensors reader and writer: what is written is read back; damage ends in one line.
#include "data/safetensors.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "data/json_file.h"
#include "tests/data/support.h"

namespace sparsek {
namespace {

using test::Bytes;
using test::expect_refused;

Bytes with_header(std::string_view header, size_t data_bytes) {
  return Bytes().string(header).raw(std::string(data_bytes, '\1'));
}

void expect_header_refused(std::string_view header, std::initializer_list<std::string_view> words) {
  const Bytes bytes = with_header(header, 16);
  expect_refused([&] { SafetensorsFile::from_bytes(bytes.span(), "a.safetensors"); }, words);
  expect_refused([&] { SafetensorsFile::from_bytes(bytes.span(), "a.safetensors"); }, {"a.safetensors"});
}

TEST(Safetensors, WritesAndReads) {
  const test::TemporaryFolder folder;
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const auto* begin = reinterpret_cast<const uint8_t*>(values.data());
  const std::vector<WeightView> tensors = {
      {"matrix", WeightType::kF32, {2, 3}, {begin, 24}},
      {"half", WeightType::kF16, {3}, {begin, 6}},
      {"empty", WeightType::kBF16, {0, 4}, {}},
  };
  const std::string path = folder.file("adapter.safetensors");
  write_safetensors(path, tensors, {{"base", "tiny"}, {"k", "508"}});
  EXPECT_EQ(folder.num_files(), 1u);  // no temporary file is left

  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"base", "tiny"}, {"k", "508"}}));
  ASSERT_EQ(file.entries().size(), 3u);
  for (const WeightView& wanted : tensors) {
    const WeightView found = file.weight(wanted.name);
    EXPECT_EQ(found.type, wanted.type);
    EXPECT_EQ(found.shape, wanted.shape);
    EXPECT_TRUE(std::equal(found.bytes.begin(), found.bytes.end(), wanted.bytes.begin(), wanted.bytes.end()));
  }
  expect_refused([&] { file.weight("other"); }, {"adapter.safetensors", "'other'"});
}

TEST(Safetensors, WritesNothingByHalves) {
  const test::TemporaryFolder folder;
  const std::vector<uint8_t> bytes(8);
  const std::vector<WeightView> wrong_size = {{"t", WeightType::kF32, {3}, bytes}};
  const std::vector<WeightView> quantised = {{"t", WeightType::kQ8_0, {32}, bytes}};
  const std::vector<WeightView> twice = {{"t", WeightType::kF32, {2}, bytes}, {"t", WeightType::kF32, {2}, bytes}};
  const std::string path = folder.file("a.safetensors");
  expect_refused([&] { write_safetensors(path, wrong_size, {}); }, {"'t'", "12", "8"});
  expect_refused([&] { write_safetensors(path, quantised, {}); }, {"'t'", "Q8_0"});
  expect_refused([&] { write_safetensors(path, twice, {}); }, {"'t'", "twice"});
  expect_refused([&] { write_safetensors(folder.file("no/a.safetensors"), {}, {}); }, {"no/a.safetensors"});
  // The target is a folder: renaming fails after everything was written.
  expect_refused([&] { write_safetensors(folder.file(""), {}, {}); }, {"cannot write"});
  EXPECT_EQ(folder.num_files(), 0u);
}

TEST(Safetensors, ListsOtherTypesAndRefusesThemAsWeights) {
  const Bytes bytes = with_header(
      R"({"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"z":{"dtype":"NEW","shape":[3],"data_offsets":[8,9]}})",
      9);
  const SafetensorsFile file = SafetensorsFile::from_bytes(bytes.span(), "a.safetensors");
  ASSERT_NE(file.find("i"), nullptr);
  EXPECT_EQ(file.find("i")->dtype, "I64");
  expect_refused([&] { file.weight("i"); }, {"'i'", "F32, F16 or BF16", "I64"});
  expect_refused([&] { file.weight("z"); }, {"'z'", "NEW"});
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const Bytes bytes = with_header(R"({"t":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", 16);
  EXPECT_NO_THROW(SafetensorsFile::from_bytes(bytes.span(), "a.safetensors"));
  for (size_t size = 0; size < bytes.span().size(); ++size) {
    EXPECT_THROW(SafetensorsFile::from_bytes(bytes.span().first(size), "a.safetensors"), DataError) << size;
  }
}

TEST(Safetensors, WrongHeaders) {
  for (const uint64_t length : {uint64_t{100}, uint64_t{1} << 40, ~uint64_t{0}}) {
    const Bytes bytes = Bytes().put(length).raw("{}");
    expect_refused([&] { SafetensorsFile::from_bytes(bytes.span(), "a.safetensors"); },
                   {"a.safetensors", std::to_string(length)});
  }
  expect_header_refused("[]", {"object", "array"});
  expect_header_refused("{", {"JSON", "byte"});
  expect_header_refused("\xff", {"JSON"});
  expect_header_refused(std::string(100'000, '['), {"deep", "100000"});
  expect_header_refused(R"({"t":[]})", {"'t'", "dtype"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4]}})", {"'t'", "data_offsets"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[0]}})", {"'t'", "data_offsets"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}})", {"'t'", "0 or more"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4.5],"data_offsets":[0,16]}})", {"'t'", "0 or more"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[0,17]}})", {"'t'", "17"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}})", {"'t'", "[16, 0]"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})", {"'t'", "12", "16"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}})",
                        {"'t'", "2^48"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}})", {"JSON"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})",
                        {"'t'", "dimensions", "9"});
  expect_header_refused(R"({"__metadata__":{"a":1}})", {"__metadata__", "'a'"});
  expect_header_refused(R"({"__metadata__":7})", {"__metadata__"});
  expect_header_refused(R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                        R"("t":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                        {"'t'", "twice"});
  expect_header_refused(R"({"s":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},)"
                        R"("t":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                        {"'s'", "'t'", "overlap"});
}

TEST(JsonFile, NestingInsideStringsDoesNotCount) {
  EXPECT_EQ(parse_json("\"" + std::string(1000, '[') + "\\\"[[\"", "x").get<std::string>().size(), 1003u);
}

}  // namespace
}  // namespace sparsek
