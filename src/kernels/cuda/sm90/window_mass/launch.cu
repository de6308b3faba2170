#include "kernels/cuda/sm90/window_mass/launch.h"

#include <cassert>

#include "kernels/cuda/shared_memory.h"
#include "kernels/cuda/sm90/window_mass/lse_kernel.cuh"
#include "kernels/cuda/sm90/window_mass/mass_kernel.cuh"

namespace sparsek::cuda::mass::sm90 {
namespace {

template <class Kernel>
void launch(Kernel* kernel, int64_t blocks, int shared_bytes, const Problem& p, cudaStream_t stream) {
  if (blocks == 0) return;
  allow_shared_bytes(kernel, shared_bytes);
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(p);
  check_cuda(cudaGetLastError(), "window_mass");
}

template <class T, int kHeadDim>
void run_typed(const Problem& p, cudaStream_t stream) {
  const int64_t lanes = int64_t{p.batch} * p.num_kv_heads;
  launch(window_lse_kernel<T, kHeadDim>, lanes * p.num_query_tiles, sizeof(typename LseTile<T, kHeadDim>::Shared), p,
         stream);
  launch(window_mass_kernel<T, kHeadDim>, lanes * p.num_key_tiles, sizeof(typename MassTile<T, kHeadDim>::Shared), p,
         stream);
}

}  // namespace

void run(const Problem& p, DType dtype, int head_dim, cudaStream_t stream) {
  if (dtype == DType::kBF16)
    head_dim == 64 ? run_typed<__nv_bfloat16, 64>(p, stream) : run_typed<__nv_bfloat16, 128>(p, stream);
  else
    head_dim == 64 ? run_typed<__half, 64>(p, stream) : run_typed<__half, 128>(p, stream);
}

}  // namespace sparsek::cuda::mass::sm90
