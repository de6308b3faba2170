// Bytes of a DecodeState, counted without allocating one: the closed formulas (docs/math.md section 6).
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "model/attention_config.h"
#include "model/config.h"
#include "ops/ops.h"

namespace sparsek::model {

// What one layer's state of kind sparsek is made with.
ops::AttentionStateOptions state_options(const ModelConfig& config, const AttentionConfig& attention,
                                         at::ScalarType dtype);
// Of that state, all of it.
int64_t state_size_in_bytes(const ops::AttentionStateOptions& options);

// Of all layers after `tokens` tokens: what `inspect` plans with. Grows with tokens for the dense kind only;
// the largest int64 where there is no such number.
int64_t state_size_in_bytes(const ModelConfig& config, const AttentionConfig& attention, at::ScalarType dtype,
                            int64_t tokens);

}  // namespace sparsek::model
