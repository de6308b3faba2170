#include "model/memory_check.h"

#include <algorithm>
#include <fstream>
#include <string>

#include "base/error.h"

namespace sparsek::model {
namespace {

std::optional<int64_t> read_number(const char* path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? std::optional(value) : std::nullopt;  // "max" is no number: no limit
}

// Page cache that the kernel gives back when asked: memory.current counts it, a freshly read model file included.
int64_t reclaimable_bytes() {
  std::ifstream stat("/sys/fs/cgroup/memory.stat");
  std::string key;
  for (int64_t value = 0; stat >> key >> value;) {
    if (key == "inactive_file") return value;
  }
  return 0;
}

}  // namespace

std::optional<int64_t> available_memory_bytes() {
  std::optional<int64_t> available;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, rest; meminfo >> key && std::getline(meminfo, rest);) {
    if (key == "MemAvailable:") available = std::stoll(rest) * 1024;  // the file says kB
  }
  const auto limit = read_number("/sys/fs/cgroup/memory.max"), used = read_number("/sys/fs/cgroup/memory.current");
  if (limit && used)
    available = std::min(available.value_or(INT64_MAX), std::max<int64_t>(*limit - *used + reclaimable_bytes(), 0));
  return available;
}

void check_memory(const std::string& path, int64_t weight_bytes, int64_t state_bytes, int64_t working_bytes,
                  std::optional<int64_t> available_bytes) {
  const int64_t needed = weight_bytes + state_bytes + working_bytes;
  if (!available_bytes || needed <= *available_bytes) return;
  const auto mebibytes = [](int64_t bytes) { return (bytes >> 20) + 1; };
  throw_data(
      "{}: needs about {} MiB of memory (weights {}, state {}, working memory {}) but {} MiB are available; free some, "
      "or use a smaller model, window or topk",
      path, mebibytes(needed), mebibytes(weight_bytes), mebibytes(state_bytes), mebibytes(working_bytes),
      *available_bytes >> 20);
}

}  // namespace sparsek::model
