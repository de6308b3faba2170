#include "cli/device.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <charconv>
#include <string_view>

#include "base/error.h"
#include "data/quote.h"
#include "ops/ops.h"

namespace sparsek::cli {

at::Device open_device(const std::string& text) {
  if (text == "cpu") return at::kCPU;
  constexpr std::string_view kNumbered = "cuda:";
  int index = 0;
  if (text != "cuda") {
    const char* end = text.data() + text.size();
    const char* number = text.data() + std::min(kNumbered.size(), text.size());
    const auto [stop, error] = std::from_chars(number, end, index);
    if (!text.starts_with(kNumbered) || error != std::errc() || stop != end || index < 0) {
      throw_usage("--device: expected cpu, cuda or cuda:N, found {}", in_quotes(text));
    }
  }
  const at::CUDAHooksInterface& cuda = at::detail::getCUDAHooks();
  if (!cuda.hasCUDART()) {
    throw_usage(
        "--device: expected a torch with CUDA for {}, found one without; build against the torch of a GPU host "
        "(docs/building-on-a-gpu-host.md), or leave --device out",
        text);
  }
  const int count = cuda.getNumGPUs();
  if (index >= count) {
    throw_usage("--device: expected {}, found {}; see what `nvidia-smi` lists, or leave --device out",
                count == 0 ? "a GPU and its driver" : "cuda:0 to cuda:" + std::to_string(count - 1),
                count == 0 ? "none" : in_quotes(text));
  }
  if (!ops::has_kernels(at::kCUDA)) {
    throw_usage(
        "--device: expected a program built with the CUDA kernels for {}, found one without; build with `cmake "
        "--preset "
        "cuda` (docs/building-on-a-gpu-host.md), or leave --device out",
        text);
  }
  return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

}  // namespace sparsek::cli
