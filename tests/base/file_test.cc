// SHA-256 against published values, its two ways against each other, and files that appear whole or not at all.
#include "base/sha256.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "base/atomic_file.h"
#include "base/mapped_file.h"

namespace sparsek {
namespace {

std::string hash_of(std::string_view text, bool use_instructions) {
  Sha256 hash(use_instructions);
  hash.update(text);
  return hash.hex();
}

// FIPS 180-4's examples, and the lengths around where the padding takes another block (by sha256sum).
TEST(Sha256, PublishedValues) {
  for (const bool use_instructions : {false, Sha256::has_instructions()}) {
    const auto hash = [=](std::string_view text) { return hash_of(text, use_instructions); };
    EXPECT_EQ(hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    EXPECT_EQ(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_EQ(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    EXPECT_EQ(hash(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST(Sha256, PiecesAndInstructionsDoNotMatter) {
  std::mt19937 rng(2406);
  std::string text;
  for (size_t length = 0; length < 300; ++length) {
    const std::string wanted = hash_of(text, false);
    EXPECT_EQ(hash_of(text, Sha256::has_instructions()), wanted) << length;
    Sha256 pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t size = std::min<size_t>(rng() % 150, text.size() - at);
      pieces.update(std::string_view(text).substr(at, size));
      at += size;
    }
    EXPECT_EQ(pieces.hex(), wanted) << length;
    pieces.update(text);  // as new
    EXPECT_EQ(pieces.hex(), wanted) << length;
    text += static_cast<char>(rng());
  }
}

class AtomicFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "sparsek_test_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string read(const std::string& path) const {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::filesystem::path folder_;
};

TEST_F(AtomicFileTest, AppearsWholeOrNotAtAll) {
  const std::string path = folder_ / "file";
  write_file_atomically(path, "old");
  {
    AtomicFile file(path);
    file.write("new, but never finished");
    file.flush();
    EXPECT_EQ(read(path), "old");
  }
  EXPECT_EQ(read(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + std::string(AtomicFile::kSuffix)));

  AtomicFile file(path);
  std::string wanted;
  for (int i = 0; i < 300'000; ++i) {
    file.write("0123456789");
    wanted += "0123456789";
  }
  const std::string large(5'000'000, 'L');  // goes past the buffer, behind what is in it
  file.write(large);
  wanted += large;
  const uint8_t begin[3] = {'a', 'b', 'c'};
  file.write_at(1, begin);
  file.write("end");
  EXPECT_EQ(file.size_bytes(), 8'000'003);
  file.commit();
  wanted.replace(1, 3, "abc");
  EXPECT_EQ(read(path), wanted + "end");
}

TEST_F(AtomicFileTest, HashOfAFileIsThatOfItsBytes) {
  for (const size_t size : {size_t{1}, size_t{4} << 20, (size_t{9} << 20) + 5}) {
    std::string content(size, 'x');
    for (size_t i = 0; i < size; i += 1000) content[i] = static_cast<char>(i / 1000);
    write_file_atomically(folder_ / "file", content);
    EXPECT_EQ(sha256_of(MappedFile(folder_ / "file")), hash_of(content, false));
  }
}

TEST_F(AtomicFileTest, SaysWhatStandsInTheWay) {
  const auto refusal = [](const std::string& path, size_t size) -> std::string {
    try {
      write_file_atomically(path, std::string(size, 'x'));
    } catch (const WriteError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal(folder_ / "none" / "file", 1).find("No such file"), std::string::npos);
  std::filesystem::create_directory(folder_ / "taken");
  EXPECT_NE(refusal(folder_ / "taken", 1).find("rename"), std::string::npos);

  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1000, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const std::string message = refusal(folder_ / "large", 5000);
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_NE(message.find("large: cannot write it: File too large"), std::string::npos) << message;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "large"));
}

}  // namespace
}  // namespace sparsek
