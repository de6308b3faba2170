#include "base/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

namespace sparsek {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw WriteError(fmt::format("{}: cannot {}: {}", path, what, std::strerror(errno)));
}

}  // namespace

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), part_path_(path_ + std::string(kSuffix)) {
  fd_ = ::open(part_path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path_, "create it");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(part_path_.c_str());
}

void AtomicFile::write_all(const uint8_t* bytes, size_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t count = ::pwrite(fd_, bytes, size, offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail(path_, "write it");
    bytes += count;
    size -= static_cast<size_t>(count);
    offset += count;
  }
}

void AtomicFile::write(std::span<const uint8_t> bytes) {
  if (bytes.size() >= kBufferBytes) {  // a tensor is not copied once more
    flush();
    write_all(bytes.data(), bytes.size(), size_bytes_);
    size_bytes_ += static_cast<int64_t>(bytes.size());
    return;
  }
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  size_bytes_ += static_cast<int64_t>(bytes.size());
  if (buffer_.size() >= kBufferBytes) flush();
}

void AtomicFile::write_at(int64_t offset, std::span<const uint8_t> bytes) {
  flush();
  write_all(bytes.data(), bytes.size(), offset);
}

void AtomicFile::flush() {
  write_all(buffer_.data(), buffer_.size(), size_bytes_ - static_cast<int64_t>(buffer_.size()));
  buffer_.clear();
}

void AtomicFile::commit() {
  flush();
  if (::fsync(fd_) != 0) fail(path_, "bring it to the disk");
  if (::rename(part_path_.c_str(), path_.c_str()) != 0) fail(path_, "rename it");
  ::close(std::exchange(fd_, -1));
  sync_folder(std::filesystem::path(path_).parent_path().string());
}

void write_file_atomically(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}

void sync_folder(const std::string& folder) {
  const int fd = ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail(folder, "open it");
  const int result = ::fsync(fd);
  ::close(fd);
  if (result != 0 && errno != EINVAL) fail(folder, "bring it to the disk");  // EINVAL: this file system has no need
}

}  // namespace sparsek
