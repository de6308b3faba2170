#include "kernels/cuda/attention.h"

#include <array>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/portable/attention.h"
#include "kernels/cuda/sm90/attention.h"

namespace sparsek::cuda {

int compute_capability() {
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>* const place = device < std::ssize(known) ? &known[device] : nullptr;
  if (place != nullptr && place->load(std::memory_order_relaxed) > 0) return place->load(std::memory_order_relaxed);
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  const int capability = 10 * major + minor;
  if (place != nullptr) place->store(capability, std::memory_order_relaxed);
  return capability;
}

const char* name(KernelSet set) {
  return set == KernelSet::kSm90 ? "sm90" : "portable";
}

const char* attention_unsupported(DType dtype, int head_dim, int num_heads, int num_kv_heads) {
  if (compute_capability() < 80) return "devices of compute capability 8.0 or later";
  if (dtype != DType::kBF16 && dtype != DType::kF16) return "dtypes bfloat16 and float16";
  if (head_dim != 64 && head_dim != 128) return "head_dim 64 and 128";
  if (num_heads > 64 * num_kv_heads) return "at most 64 query heads per key/value head";
  return nullptr;
}

KernelSet attention_kernel_set(const AttentionFwdParams& params, const LiveLists& live, KernelChoice choice) {
  const bool sm90 = choice != KernelChoice::kPortable && compute_capability() == 90;
  return sm90 && sm90::serves_forward(params, live) ? KernelSet::kSm90 : KernelSet::kPortable;
}

KernelSet attention_backward_kernel_set(const AttentionBwdParams& params, const LiveLists& live, KernelChoice choice) {
  const bool sm90 = choice != KernelChoice::kPortable && compute_capability() == 90;
  return sm90 && sm90::serves_backward(params, live) ? KernelSet::kSm90 : KernelSet::kPortable;
}

int attention_chunk(int group) {
  return sm90::attention_chunk(group);
}

int attention_max_far(KernelSet set, int group, bool forward_only) {
  return set == KernelSet::kSm90 ? sm90::attention_max_far(group, forward_only) : INT32_MAX;
}

void attention_forward(const AttentionFwdParams& params, const LiveLists& live, cudaStream_t stream,
                       KernelChoice choice) {
  if (attention_kernel_set(params, live, choice) == KernelSet::kSm90) {
    sm90::attention_forward(params, live, stream);
  } else {
    portable::attention_forward(params, live, stream);
  }
}

int64_t attention_backward_workspace_bytes(const AttentionBwdParams& params, const LiveLists& live,
                                           KernelChoice choice) {
  if (attention_backward_kernel_set(params, live, choice) == KernelSet::kSm90) {
    return sm90::attention_backward_workspace_bytes(params, live);
  }
  return portable::attention_backward_workspace_bytes(params, live);
}

void attention_backward(const AttentionBwdParams& params, const LiveLists& live, void* workspace, cudaStream_t stream,
                        KernelChoice choice) {
  if (attention_backward_kernel_set(params, live, choice) == KernelSet::kSm90) {
    sm90::attention_backward(params, live, workspace, stream);
  } else {
    portable::attention_backward(params, live, workspace, stream);
  }
}

}  // namespace sparsek::cuda
