// The bytes of an input file in bounded pieces, unpacked where it is gzip, with the hash of what lies on the disk.
#pragma once
#include <zlib.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/sha256.h"
#include "data/corpus/inputs.h"

namespace sparsek {

class ByteSource {
 public:
  // Bytes from `begin` on (gzip: 0). The hash is of the bytes on the disk in [begin, hash_end). `bytes_done` grows with
  // those read. Throws DataError naming the file when it cannot be read, is no gzip file though named so, or has
  // another size than when it was found.
  ByteSource(const InputFile& file, int64_t begin, int64_t hash_end, std::atomic<int64_t>& bytes_done);
  ~ByteSource();
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;

  std::string_view next();  // valid until the next call; empty at the end of the file
  // After the last byte that is hashed was read.
  std::string sha256() { return hash_.hex(); }

 private:
  struct Inflater;
  std::string_view read();  // the next bytes from the disk
  std::string_view inflate_next();

  const InputFile& file_;
  int64_t offset_, hash_end_;
  std::atomic<int64_t>& bytes_done_;
  int fd_ = -1;
  Sha256 hash_;
  std::vector<char> buffer_;
  std::unique_ptr<Inflater> inflater_;
};

}  // namespace sparsek
