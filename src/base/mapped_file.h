// A file mapped read-only into memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sparsek {

class MappedFile {
 public:
  // Maps all of `path`. Throws DataError naming the path when it cannot be opened, is no regular file, or is empty.
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, size_bytes_}; }
  const std::string& path() const { return path_; }

  // Gives the pages of [offset, offset + size_bytes) back to the kernel; the next read maps them again.
  void release_pages(size_t offset, size_t size_bytes) const;

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_bytes_ = 0;
};

}  // namespace sparsek
