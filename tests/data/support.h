// Files for the tests of data/: a GGUF writer that also writes wrong ones, temporary files, and the check of messages.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace sparsek::test {

// Bytes of a file, appended one value at a time.
class Bytes {
 public:
  template <class T>
  Bytes& put(T value) {
    const auto* begin = reinterpret_cast<const uint8_t*>(&value);
    bytes_.insert(bytes_.end(), begin, begin + sizeof(T));
    return *this;
  }
  Bytes& raw(std::string_view text) {
    bytes_.insert(bytes_.end(), text.begin(), text.end());
    return *this;
  }
  Bytes& string(std::string_view text) { return put<uint64_t>(text.size()).raw(text); }
  Bytes& pad(size_t alignment) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  Bytes& header(uint64_t num_tensors, uint64_t num_values, uint32_t version = 3) {
    return raw("GGUF").put(version).put(num_tensors).put(num_values);
  }
  Bytes& uint32(std::string_view key, uint32_t value) { return string(key).put<uint32_t>(4).put(value); }
  Bytes& text(std::string_view key, std::string_view value) { return string(key).put<uint32_t>(8).string(value); }
  Bytes& texts(std::string_view key, const std::vector<std::string>& values) {
    string(key).put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(values.size());
    for (const std::string& value : values) string(value);
    return *this;
  }
  Bytes& tensor(std::string_view name, std::initializer_list<uint64_t> dims, uint32_t type, uint64_t offset) {
    string(name).put(static_cast<uint32_t>(dims.size()));
    for (const uint64_t size : dims) put(size);
    return put(type).put(offset);
  }
  std::span<const uint8_t> span() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

// A folder that is removed with what is in it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "sparsek_test_XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string file(std::string_view name) const { return (path_ / name).string(); }
  std::string write(std::string_view name, std::string_view content) const {
    std::ofstream(file(name), std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
    return file(name);
  }
  size_t num_files() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

// Runs `action`, which must throw a DataError of one line that contains each of `words`.
inline void expect_refused(const std::function<void()>& action, std::initializer_list<std::string_view> words) {
  try {
    action();
  } catch (const DataError& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string_view word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << "no '" << word << "' in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "wanted a DataError";
}

}  // namespace sparsek::test
