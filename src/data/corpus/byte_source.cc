#include "data/corpus/byte_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "base/error.h"

namespace sparsek {
namespace {

constexpr size_t kReadBytes = size_t{1} << 18, kInflateBytes = size_t{1} << 18;
constexpr int kGzipWindowBits = 15 + 16;  // the largest window; a gzip header and no other

}  // namespace

struct ByteSource::Inflater {
  z_stream stream{};
  std::vector<char> out = std::vector<char>(kInflateBytes);
  bool in_member = false;  // between a gzip header and its checksum; a file may hold several members
  bool had_member = false;
  bool at_end = false;  // of the file
  Inflater() {
    if (::inflateInit2(&stream, kGzipWindowBits) != Z_OK) throw std::bad_alloc();
  }
  ~Inflater() { ::inflateEnd(&stream); }
};

ByteSource::ByteSource(const InputFile& file, int64_t begin, int64_t hash_end, std::atomic<int64_t>& bytes_done)
    : file_(file), offset_(begin), hash_end_(hash_end), bytes_done_(bytes_done), buffer_(kReadBytes) {
  fd_ = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) throw_data("{}: cannot open: {}", file.path, std::strerror(errno));
  struct stat info{};
  if (::fstat(fd_, &info) != 0 || info.st_size != file.size_bytes) {
    ::close(fd_);
    throw_data("{}: expected {} bytes as when the corpus was listed, found {}; it changed", file.path, file.size_bytes,
               int64_t{info.st_size});
  }
  if (file.is_gzip) inflater_ = std::make_unique<Inflater>();
}

ByteSource::~ByteSource() {
  if (fd_ >= 0) ::close(fd_);
}

std::string_view ByteSource::read() {
  ssize_t count = 0;
  do {
    count = ::pread(fd_, buffer_.data(), buffer_.size(), offset_);
  } while (count < 0 && errno == EINTR);
  if (count < 0) throw_data("{}: cannot read after {} bytes: {}", file_.path, offset_, std::strerror(errno));
  if (count == 0 && offset_ != file_.size_bytes) {
    throw_data("{}: expected {} bytes as when the corpus was listed, found {}; it changed", file_.path,
               file_.size_bytes, offset_);
  }
  const std::string_view bytes(buffer_.data(), static_cast<size_t>(count));
  const int64_t hashed = std::clamp<int64_t>(hash_end_ - offset_, 0, count);
  hash_.update(bytes.substr(0, static_cast<size_t>(hashed)));
  bytes_done_.fetch_add(hashed, std::memory_order_relaxed);
  offset_ += count;
  return bytes;
}

std::string_view ByteSource::inflate_next() {
  Inflater& in = *inflater_;
  z_stream& stream = in.stream;
  while (true) {
    if (stream.avail_in == 0 && !in.at_end) {
      const std::string_view bytes = read();
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
      stream.avail_in = static_cast<uInt>(bytes.size());
      in.at_end = bytes.empty();
    }
    if (!in.in_member) {
      // Between members: zeros are padding, as gzip itself takes them, anything else begins a member.
      while (in.had_member && stream.avail_in > 0 && *stream.next_in == 0) {
        ++stream.next_in;
        --stream.avail_in;
      }
      if (stream.avail_in == 0) {
        if (in.at_end && in.had_member) return {};
        if (in.at_end) throw_data("{}: expected gzip data, found an empty file", file_.path);
        continue;
      }
      in.in_member = true;
    } else if (stream.avail_in == 0 && in.at_end) {
      throw_data("{}: expected the rest of the gzip data, found the end of the file; it is truncated", file_.path);
    }
    stream.next_out = reinterpret_cast<Bytef*>(in.out.data());
    stream.avail_out = static_cast<uInt>(in.out.size());
    const int result = ::inflate(&stream, Z_NO_FLUSH);
    if (result == Z_MEM_ERROR) throw std::bad_alloc();
    if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
      throw_data("{}: expected gzip data, found an error ({}); the file is damaged", file_.path,
                 stream.msg != nullptr ? stream.msg : "wrong checksum or dictionary");
    }
    if (result == Z_STREAM_END) {
      in.in_member = false;
      in.had_member = true;
      ::inflateReset(&stream);
    }
    const size_t size = in.out.size() - stream.avail_out;
    if (size > 0) return {in.out.data(), size};
  }
}

std::string_view ByteSource::next() {
  return inflater_ ? inflate_next() : read();
}

}  // namespace sparsek
