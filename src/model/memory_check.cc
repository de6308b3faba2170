#include "model/memory_check.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "base/error.h"
#include "base/saturate.h"

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

// What the limit leaves of the address space, apart from a reserve for the stacks of threads still to be started.
std::optional<int64_t> address_space_bytes() {
  constexpr int64_t kReserved = int64_t{64} << 20;
  rlimit limit{};
  const auto pages = read_number("/proc/self/statm");
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || !pages) return std::nullopt;
  const int64_t used = *pages * ::sysconf(_SC_PAGESIZE);
  return std::max(static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, INT64_MAX)) - used - kReserved, int64_t{0});
}

int64_t mebibytes(int64_t bytes) {
  return (bytes >> 20) + 1;
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
  if (const auto left = address_space_bytes()) available = std::min(available.value_or(INT64_MAX), *left);
  return available;
}

std::optional<int64_t> available_memory_bytes(at::Device device) {
  if (device.is_cpu()) return available_memory_bytes();
  at::globalContext().lazyInitDevice(device.type());
  const auto [free, total] = c10::getDeviceAllocator(device.type())->getMemoryInfo(device.index());
  return static_cast<int64_t>(free);
}

void check_memory(const std::string& path, const MemoryPlan& plan, std::optional<int64_t> available_bytes) {
  const int64_t needed = saturating_add(plan.state_bytes, plan.weight_bytes + plan.working_bytes);
  if (!available_bytes || needed <= *available_bytes) return;
  const std::string tokens = plan.growing_tokens ? fmt::format(" of {} tokens", *plan.growing_tokens) : std::string();
  throw_memory("{}: expected about {} MiB of memory{} (weights {}, state{} {}, working memory {}), found {}", path,
               mebibytes(needed), plan.device.is_cpu() ? "" : " on " + plan.device.str(), mebibytes(plan.weight_bytes),
               tokens, mebibytes(plan.state_bytes), mebibytes(plan.working_bytes), *available_bytes >> 20);
}

void check_growth(int64_t tokens, int64_t more_bytes, std::optional<int64_t> available_bytes) {
  if (!available_bytes || more_bytes <= *available_bytes) return;
  throw_memory("dense attention: expected {} MiB of memory for a cache of {} tokens, found {}", mebibytes(more_bytes),
               tokens, *available_bytes >> 20);
}

}  // namespace sparsek::model
