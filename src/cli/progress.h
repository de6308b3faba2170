// A progress line on stderr, for terminals only.
#pragma once
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace sparsek::cli {

// Redraws at most ten times a second; erases itself when it goes out of scope.
class Progress {
 public:
  // `unit` as in "12,288 / 65,536 tokens". Without a total: rate only.
  Progress(std::string label, std::string unit, std::optional<int64_t> total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(int64_t done);
  void set_total(int64_t total) { total_ = total; }

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_, unit_;
  std::optional<int64_t> total_;
  bool is_terminal_;
  bool drawn_ = false;
  Clock::time_point start_, last_draw_;
};

// 1234567 -> "1,234,567".
std::string with_separators(int64_t value);
// Bytes as "29.5 MiB".
std::string human_bytes(double bytes);

}  // namespace sparsek::cli
