#include "data/text_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace sparsek {

TextReader::TextReader(std::string path, size_t chunk_bytes) : path_(std::move(path)), buffer_(chunk_bytes) {
  if (path_ == "-") {
    path_ = "standard input";
    fd_ = STDIN_FILENO;
  } else {
    if (path_.empty()) throw_data("expected the path of a text, found an empty path");
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);  // of a pipe: waits for somebody who writes
    if (fd_ < 0 && errno == EINTR) throw Interrupted(path_ + ": interrupted while opening");
    if (fd_ < 0) throw_data("{}: cannot open: {}", path_, std::strerror(errno));
  }
  struct stat info{};
  if (::fstat(fd_, &info) != 0) throw_data("{}: expected it to be open, found it closed; give it a text", path_);
  if (S_ISDIR(info.st_mode)) {
    if (fd_ != STDIN_FILENO) ::close(fd_);
    throw_data("{}: expected a text, found a directory", path_);
  }
  if (S_ISREG(info.st_mode)) size_bytes_ = info.st_size;
}

TextReader::~TextReader() {
  if (fd_ != STDIN_FILENO) ::close(fd_);
}

std::string_view TextReader::next() {
  const ssize_t count = ::read(fd_, buffer_.data(), buffer_.size());
  if (count < 0 && errno == EINTR) throw Interrupted(path_ + ": interrupted while reading");
  if (count < 0) throw_data("{}: cannot read after {} bytes: {}", path_, bytes_read_, std::strerror(errno));
  bytes_read_ += count;
  return {buffer_.data(), static_cast<size_t>(count)};
}

std::string read_text(const std::string& path) {
  TextReader reader(path);
  std::string text;
  for (std::string_view chunk; !(chunk = reader.next()).empty();) text += chunk;
  return text;
}

}  // namespace sparsek
