// What every kernel asks for as dynamic shared memory, against what the devices it runs on have. Needs no GPU.
#include "kernels/cuda/shared_memory.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/portable/attention_bwd/key_kernel.cuh"
#include "kernels/cuda/portable/attention_bwd/query_kernel.cuh"
#include "kernels/cuda/portable/attention_fwd/kernel.cuh"
#include "kernels/cuda/select/chunk.cuh"
#include "kernels/cuda/sm90/attention_bwd/dq_kernel.cuh"
#include "kernels/cuda/sm90/attention_bwd/kernel.cuh"
#include "kernels/cuda/sm90/attention_fwd/kernel.cuh"
#include "kernels/cuda/sm90/window_mass/lse_kernel.cuh"
#include "kernels/cuda/sm90/window_mass/mass_kernel.cuh"
#include "kernels/cuda/window_mass/lse_kernel.cuh"
#include "kernels/cuda/window_mass/mass_kernel.cuh"

namespace sparsek::cuda {
namespace {

// The CUDA C++ programming guide's "maximum amount of shared memory per thread block", by compute capability.
struct Device {
  int capability, bytes;
};
constexpr Device kDevices[] = {{80, 163 * 1024}, {86, 99 * 1024},   {87, 163 * 1024},  {89, 99 * 1024},
                               {90, 227 * 1024}, {100, 227 * 1024}, {103, 227 * 1024}, {120, 99 * 1024}};

struct Request {
  const char* kernel;
  int64_t bytes;
};

template <int kHeadDim>
std::vector<Request> portable_requests() {
  return {{"attention_fwd", sizeof(portable::FwdShared<kHeadDim>)},
          {"attention_dq", sizeof(portable::QueryShared<kHeadDim>)},
          {"attention_dkv", sizeof(portable::KeyShared<kHeadDim>)},
          {"window_lse", sizeof(typename mass::LseTile<__half, kHeadDim>::Shared)},
          {"window_mass", sizeof(typename mass::MassTile<__half, kHeadDim>::Shared)}};
}

template <int kHeadDim>
std::vector<Request> sm90_requests() {
  using Shape = sm90::Shape<__half, kHeadDim>;
  return {{"attention_fwd", sizeof(sm90::Shared<Shape, false>)},
          {"attention_fwd far", sizeof(sm90::Shared<Shape, true>)},
          {"attention_dq", sizeof(sm90::DqShared<Shape, false>)},
          {"attention_dq far", sizeof(sm90::DqShared<Shape, true>)},
          {"attention_dkv", sizeof(sm90::BwdShared<Shape>)},
          {"window_lse", sizeof(typename mass::sm90::LseTile<__half, kHeadDim>::Shared)},
          {"window_mass", sizeof(typename mass::sm90::MassTile<__half, kHeadDim>::Shared)}};
}

TEST(CudaSharedMemory, PortableKernelsFitEveryDevice) {
  for (const Device& device : kDevices) EXPECT_GE(device.bytes, kPortableSharedBytes) << device.capability;
  for (const auto& requests : {portable_requests<64>(), portable_requests<128>()}) {
    for (const Request& request : requests) EXPECT_LE(request.bytes, kPortableSharedBytes) << request.kernel;
  }
}

TEST(CudaSharedMemory, HopperKernelsFitHopper) {
  for (const auto& requests : {sm90_requests<64>(), sm90_requests<128>()}) {
    for (const Request& request : requests) EXPECT_LE(request.bytes, 227 * 1024) << request.kernel;
  }
}

// Selection's chunk kernel: two CTAs an SM on 9.0 and 10.0, and what fits elsewhere.
TEST(CudaSharedMemory, SelectionChoosesWhatFits) {
  for (const Device& device : kDevices) {
    const int entries = selection::shared_entries(device.bytes), bytes = selection::chunk_shared_bytes(entries);
    EXPECT_LE(bytes, device.bytes) << device.capability;
    EXPECT_EQ(entries % 32, 0) << device.capability;
    EXPECT_EQ(entries == 2944, device.bytes >= 113 * 1024) << device.capability;
    EXPECT_GT(entries, selection::kMaxChunk) << device.capability;  // a chunk's own arrivals and a pool besides
  }
}

}  // namespace
}  // namespace sparsek::cuda
