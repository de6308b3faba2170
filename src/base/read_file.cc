#include "base/read_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace sparsek {

std::string read_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw_data("{}: cannot open: {}", path, std::strerror(errno));
  std::string text;
  constexpr size_t kBlock = size_t{1} << 16;
  for (;;) {
    const size_t size = text.size();
    text.resize(size + kBlock);
    const ssize_t count = ::read(fd, text.data() + size, kBlock);
    const int error = errno;
    text.resize(size + (count > 0 ? static_cast<size_t>(count) : 0));
    if (count > 0 || (count < 0 && error == EINTR)) continue;
    ::close(fd);
    if (count < 0) throw_data("{}: cannot read: {}", path, std::strerror(error));
    return text;
  }
}

}  // namespace sparsek
