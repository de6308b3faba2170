// A file that appears under its name whole or not at all.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace sparsek {

// The disk is full, or there is no right to write.
class WriteError : public DataError {
 public:
  using DataError::DataError;
};

// Written beside its name as NAME.part, brought to the disk and renamed by commit(); a power cut leaves the old file
// or the new one. Throws WriteError naming the path.
class AtomicFile {
 public:
  static constexpr std::string_view kSuffix = ".part";

  explicit AtomicFile(std::string path);
  ~AtomicFile();  // removes what was not committed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const uint8_t> bytes);
  void write(std::string_view bytes) { write({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}); }
  void write_at(int64_t offset, std::span<const uint8_t> bytes);  // over what was written before
  int64_t size_bytes() const { return size_bytes_; }
  const std::string& part_path() const { return part_path_; }
  void flush();   // part_path() has all bytes from here on
  void commit();  // no writing afterwards

 private:
  void write_all(const uint8_t* bytes, size_t size, int64_t offset);

  std::string path_, part_path_;
  int fd_ = -1;
  int64_t size_bytes_ = 0;
  std::vector<uint8_t> buffer_;  // the last bytes, not yet in the file
};

// A small file in one go.
void write_file_atomically(const std::string& path, std::string_view content);

// Makes the names in `folder`, which renaming and removing changed, last through a power cut.
void sync_folder(const std::string& folder);

}  // namespace sparsek
