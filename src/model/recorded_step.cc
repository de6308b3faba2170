#include "model/recorded_step.h"

#include <c10/util/Exception.h>

#include <exception>
#include <optional>
#include <utility>

#ifdef SPARSEK_TORCH_CUDA  // the torch of this build has CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace sparsek::model {
namespace {

class RepeatedWork final : public RecordedStep {
 public:
  explicit RepeatedWork(std::function<void()> work) : work_(std::move(work)) {}
  void run() override { work_(); }

 private:
  std::function<void()> work_;
};

#ifdef SPARSEK_TORCH_CUDA
class GraphStep final : public RecordedStep {
 public:
  GraphStep(std::function<void()> work, at::Device device)
      : work_(std::move(work)), stream_(c10::cuda::getStreamFromPool(false, device.index())) {}

  void run() override {
    if (!warmed_up_) {  // libraries make their handles and workspaces now: a capture may allocate nothing
      warm_up();
    } else {
      if (!recorded_) record();
      graph_->replay();
    }
  }

 private:
  void warm_up() {
    c10::cuda::getCurrentCUDAStream(stream_.device_index()).synchronize();
    const c10::cuda::CUDAStreamGuard guard(stream_);
    work_();
    stream_.synchronize();
    warmed_up_ = true;
  }

  void record() {
    c10::cuda::getCurrentCUDAStream(stream_.device_index()).synchronize();
    const c10::cuda::CUDAStreamGuard guard(stream_);
    graph_.emplace();
    graph_->capture_begin();
    try {
      work_();
    } catch (...) {
      end_capture();
      throw;
    }
    graph_->capture_end();
    recorded_ = true;
  }

  // An open capture would fail every later call on the device. Ending one that the work has broken is itself an error:
  // the work's own is the one to report.
  void end_capture() {
    try {
      graph_->capture_end();
    } catch (const std::exception&) {
    }
    graph_.reset();
  }

  std::function<void()> work_;
  c10::cuda::CUDAStream stream_;
  std::optional<at::cuda::CUDAGraph> graph_;
  bool warmed_up_ = false, recorded_ = false;
};
#endif

}  // namespace

std::unique_ptr<RecordedStep> record_step(std::function<void()> work, at::Device device) {
#ifdef SPARSEK_TORCH_CUDA
  if (device.is_cuda()) return std::make_unique<GraphStep>(std::move(work), device);
#endif
  return std::make_unique<RepeatedWork>(std::move(work));
}

}  // namespace sparsek::model
