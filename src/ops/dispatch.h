// The dispatched operations that other operations are made of, as C++ functions: one declaration per schema of
// schema.cc that is called from C++. ops.h has the ones for users.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace sparsek::ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors10 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors12 =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors4 call_select(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                     std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens);
Tensors12 call_select_chunk(const Tensor& candidate_scores, const Tensor& slot_scores, const Tensor& slot_positions,
                            const Tensor& pool_scores, const Tensor& lengths, int64_t topk, int64_t window_size,
                            int64_t num_sinks, int64_t pool_size);
Tensors7 call_visibility(const Tensor& scores, const Tensor& tau, const Tensor& expiry, const Tensor& frac_begin,
                         const Tensor& frac_end, int64_t window_size, int64_t num_sinks, const MaybeTensor& cu_seqlens);
Tensors8 call_select_rows(const Tensor& scores, int64_t topk, int64_t window_size, int64_t num_sinks,
                          std::optional<int64_t> pool_size, const MaybeTensor& cu_seqlens, int64_t far_lists_group);
Tensors8 call_chunk_visibility(const Tensor& lengths, const Tensor& slot_expiry, const Tensor& slot_frac_begin,
                               const Tensor& slot_frac_end, const Tensor& pool_frac_begin, const Tensor& pool_frac_end,
                               const Tensor& arrival_expiry, const Tensor& arrival_frac_begin,
                               const Tensor& arrival_frac_end, const Tensor& new_slot_source, int64_t window_size,
                               int64_t num_sinks);
Tensors4 call_window_rows(const Tensor& q, const MaybeTensor& lengths, const MaybeTensor& cu_seqlens,
                          int64_t window_size, int64_t num_sinks);
Tensors2 call_attention_rows(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& q_far,
                             const MaybeTensor& k_far, const Tensor& row_scores, const Tensor& tau,
                             const Tensor& window_begin, const Tensor& far_begin, const Tensor& far_end,
                             const Tensor& frac_begin, const Tensor& frac_end, std::string_view gate,
                             double softmax_scale, bool deterministic, std::optional<int64_t> max_far,
                             const MaybeTensor& far_lists);

// Runs the rest of an operation without autograd, as its Autograd kernel does once it has recorded what it needs.
struct BelowAutograd {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
};

}  // namespace sparsek::ops
