#include "model/attention.h"

namespace sparsek::model {

std::unique_ptr<Attention> make_attention(const ModelConfig& config, const AttentionConfig& attention,
                                          const Placement& placement, const Adapter* adapter, int64_t expected_tokens) {
  switch (attention.kind) {
    case AttentionKind::kDense:
      return make_dense_attention(config, placement, expected_tokens);
    case AttentionKind::kWindow:
      return make_window_attention(config, attention, placement);
    case AttentionKind::kSparsek:
      return make_sparsek_attention(config, attention, placement, adapter);
  }
  return nullptr;
}

}  // namespace sparsek::model
