#include "model/attention.h"

namespace sparsek::model {

std::unique_ptr<Attention> make_attention(const ModelConfig& config, const AttentionConfig& attention,
                                          at::ScalarType dtype, const Adapter* adapter, int64_t expected_tokens) {
  switch (attention.kind) {
    case AttentionKind::kDense:
      return make_dense_attention(config, dtype, expected_tokens);
    case AttentionKind::kWindow:
      return make_window_attention(config, attention, dtype);
    case AttentionKind::kSparsek:
      return make_sparsek_attention(config, attention, dtype, adapter);
  }
  return nullptr;
}

}  // namespace sparsek::model
