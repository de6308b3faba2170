// metrics.jsonl: one JSON object a line, appended as the run goes.
#pragma once
#include <cstdint>
#include <string>

#include "train/trainer.h"

namespace sparsek::train {

class MetricsFile {
 public:
  // Keeps the lines of steps up to `step`: what an ended run wrote after its last checkpoint will be written again.
  MetricsFile(std::string path, int64_t step);
  // Throws WriteError.
  void append(const StepReport& report);

 private:
  std::string path_;
};

}  // namespace sparsek::train
