// Reads a text file or standard input in bounded chunks. Bytes pass through as they are.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sparsek {

class TextReader {
 public:
  // "-" is standard input. Throws DataError naming the path when it cannot be opened or is a directory, and
  // Interrupted as next() does: a named pipe opens when somebody writes.
  explicit TextReader(std::string path, size_t chunk_bytes = size_t{1} << 16);
  ~TextReader();
  TextReader(const TextReader&) = delete;
  TextReader& operator=(const TextReader&) = delete;

  // Throws Interrupted when a signal whose handler does not restart system calls comes while it waits.
  std::string_view next();  // the next chunk, valid until the next call; empty at the end of the text
  std::optional<int64_t> size_bytes() const { return size_bytes_; }  // known for regular files only
  int64_t bytes_read() const { return bytes_read_; }

 private:
  std::string path_;
  int fd_ = -1;
  std::optional<int64_t> size_bytes_;
  int64_t bytes_read_ = 0;
  std::vector<char> buffer_;
};

// All of a small text, read so.
std::string read_text(const std::string& path);

}  // namespace sparsek
