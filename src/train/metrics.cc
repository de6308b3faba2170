#include "train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/atomic_file.h"

namespace sparsek::train {

MetricsFile::MetricsFile(std::string path, int64_t step) : path_(std::move(path)) {
  std::ifstream file(path_);
  std::string kept, line;
  while (std::getline(file, line)) {
    const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || object.value("step", int64_t{0}) > step) continue;  // a half-written line goes too
    kept += line + "\n";
  }
  if (file.is_open()) write_file_atomically(path_, kept);
}

void MetricsFile::append(const StepReport& report) {
  nlohmann::ordered_json object = {{"step", report.step},
                                   {"loss", report.loss},
                                   {"rate", report.rate},
                                   {"gradient_norm", report.gradient_norm},
                                   {"tokens", report.tokens},
                                   {"skipped_steps", report.skipped_steps},
                                   {"tokens_per_second", report.tokens_per_second},
                                   {"memory_bytes", report.memory_bytes}};
  if (report.kl != 0) object["kl"] = report.kl;
  if (report.validation) {
    object["validation_loss"] = report.validation->loss;
    object["validation_accuracy"] = report.validation->accuracy;
  }
  const std::string line = object.dump() + "\n";
  const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const ssize_t written = fd < 0 ? -1 : ::write(fd, line.data(), line.size());
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (written != static_cast<ssize_t>(line.size())) {
    throw WriteError(fmt::format("{}: cannot write it: {}", path_, written < 0 ? std::strerror(error) : "disk full"));
  }
}

}  // namespace sparsek::train
