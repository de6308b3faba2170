// Autocast: q, k, v, q_far and k_far become the autocast dtype; scores keep float32 (float64 tensors are left alone).
#pragma once
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace sparsek::ops {

template <c10::DeviceType device>
struct Autocast {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device))};
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);

  Tensor operator()(const Tensor& tensor) const { return at::autocast::cached_cast(dtype, tensor, device); }
  MaybeTensor operator()(const MaybeTensor& tensor) const {
    return given(tensor) ? MaybeTensor((*this)(*tensor)) : MaybeTensor();
  }
};

}  // namespace sparsek::ops
