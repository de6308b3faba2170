// Work on a device that is repeated on the same tensors: a CUDA graph on a GPU, where launching hundreds of small
// kernels one by one takes longer than they run; elsewhere, and for tests, simply the work again.
#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace sparsek::model {

class RecordedStep {
 public:
  virtual ~RecordedStep() = default;
  virtual void run() = 0;
};

// `work` reads and writes tensors that stay where they are, waits for no device, and does the same every time. On a GPU
// it is called twice: the first run is the work itself, the second records it.
std::unique_ptr<RecordedStep> record_step(std::function<void()> work, at::Device device);

}  // namespace sparsek::model
