#include "model/weights.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <span>

#include "base/bf16.h"
#include "base/error.h"

namespace sparsek::model {
namespace {

constexpr int64_t kRowsPerStep = 256;  // re-encoding scratch: this many rows in float32

using Notices = std::map<std::string, int64_t>;  // "Q4_K as Q8_0" -> number of tensors

struct Part {
  WeightId weight;
  WeightId bias;
};

// A stack of matrices with the same input, as they lie in one packed weight.
struct Stack {
  std::vector<Part> parts;
  int64_t in_features = 0, out_features = 0;
  bool has_bias = false;
  WeightType type = WeightType::kF32;
};

Stack plan_stack(const Checkpoint& checkpoint, std::vector<Part> parts, bool has_bias, int64_t layer,
                 at::ScalarType dtype) {
  Stack stack{std::move(parts), 0, 0, has_bias, WeightType::kF32};
  std::vector<WeightType> types;
  for (const Part& part : stack.parts) {
    const WeightView view = checkpoint.weight(part.weight, layer);
    stack.in_features = view.shape[1];
    stack.out_features += view.shape[0];
    types.push_back(view.type);
  }
  stack.type = packed_type(types, stack.in_features, dtype);
  return stack;
}

// Rows of a matrix in the order of the file to rows in our order.
struct RowOrder {
  int64_t interleaved_head_dim = 0;  // 0: as in the file
  int64_t operator()(int64_t row) const {
    if (interleaved_head_dim == 0) return row;
    const int64_t head = row / interleaved_head_dim, within = row % interleaved_head_dim;
    return head * interleaved_head_dim + (within % 2) * (interleaved_head_dim / 2) + within / 2;
  }
};

// Q4_0 blocks, d (q - 8), as Q4_1 blocks, d q + m with m = -8 d: exact, as doubling a half is. False when m overflows.
bool q4_0_to_q4_1(const uint8_t* blocks, int64_t num_blocks, uint8_t* out) {
  bool fits = true;
  for (int64_t b = 0; b < num_blocks; ++b, blocks += 18, out += 20) {
    uint16_t scale = 0;
    std::memcpy(&scale, blocks, 2);
    uint16_t minimum = scale & 0x7fffu;
    for (int doubling = 0; doubling < 3; ++doubling) minimum += minimum < 0x0400u ? minimum : 0x0400u;
    fits = fits && minimum < 0x7c00u;
    minimum |= ~scale & 0x8000u;
    std::memcpy(out, &scale, 2);
    std::memcpy(out + 2, &minimum, 2);
    std::memcpy(out + 4, blocks + 2, 16);
  }
  return fits;
}

void pack_part(const Checkpoint& checkpoint, const WeightView& view, RowOrder order, int64_t row_offset,
               ops::PackedLinear& packed) {
  const int64_t rows = view.shape[0], columns = view.shape[1];
  const int64_t row_bytes = static_cast<int64_t>(view.bytes.size()) / rows;
  const WeightLayout target = layout(packed.type);
  const int64_t target_row_bytes = columns / target.block_elements * target.block_bytes;
  const bool as_it_is = view.type == packed.type;
  const int64_t step = std::min(kRowsPerStep, rows);
  std::vector<float> values(as_it_is ? 0 : step * columns);
  std::vector<uint8_t> encoded(as_it_is ? 0 : step * target_row_bytes);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const uint8_t* blocks = view.bytes.data() + first * row_bytes;
    if (view.type == WeightType::kQ4_0 && packed.type == WeightType::kQ4_1) {
      if (!q4_0_to_q4_1(blocks, count * columns / target.block_elements, encoded.data())) {
        throw_data("{}: tensor {} holds values beyond 65504; the file is damaged or was converted wrongly",
                   checkpoint.path(), view.name);
      }
      blocks = encoded.data();
    } else if (!as_it_is) {
      float* plain = packed.type == WeightType::kF32 ? reinterpret_cast<float*>(encoded.data()) : values.data();
      dequantise(view.type, blocks, count * columns, plain);
      if (packed.type == WeightType::kQ8_0) quantise_q8_0(plain, count * columns, encoded.data());
      blocks = encoded.data();
    }
    if (order.interleaved_head_dim == 0) {
      ops::pack_rows(packed, row_offset + first, count, blocks);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        ops::pack_rows(packed, row_offset + order(first + r), 1, blocks + r * target_row_bytes);
      }
    }
    WeightView read = view;
    read.bytes = view.bytes.subspan(first * row_bytes, count * row_bytes);
    checkpoint.release(read);
  }
}

at::Tensor load_vector(const Checkpoint& checkpoint, const WeightView& view, RowOrder order = {}) {
  check_finite(view, checkpoint.path());
  const int64_t count = view.num_elements();
  std::vector<float> values(count);
  dequantise(view.type, view.bytes.data(), count, values.data());
  at::Tensor vector = at::empty({count}, at::kFloat);
  float* out = vector.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) out[order(i)] = values[i];
  return vector;
}

ops::PackedLinear load_stack(const Checkpoint& checkpoint, const Stack& stack, int64_t layer, ops::PackedArena& arena,
                             Notices& notices) {
  ops::PackedLinear packed = arena.take(stack.type, stack.out_features, stack.in_features);
  if (stack.has_bias) packed.bias = at::empty({stack.out_features}, at::kFloat);
  int64_t row = 0;
  for (const Part& part : stack.parts) {
    const WeightView view = checkpoint.weight(part.weight, layer);
    const RowOrder order{checkpoint.has_interleaved_rotary(part.weight) ? checkpoint.config().head_dim : 0};
    check_finite(view, checkpoint.path());
    const bool is_exact = view.type == stack.type || stack.type == WeightType::kQ4_1;
    if (!is_exact) ++notices[fmt::format("{} as {}", sparsek::name(view.type), sparsek::name(stack.type))];
    pack_part(checkpoint, view, order, row, packed);
    if (stack.has_bias) {
      packed.bias.narrow(0, row, view.shape[0])
          .copy_(load_vector(checkpoint, checkpoint.weight(part.bias, layer), order));
    }
    row += view.shape[0];
  }
  return packed;
}

// The matrix of a stack as a tensor of the activations' dtype, made on the CPU and then moved.
ops::PackedLinear load_plain_stack(const Checkpoint& checkpoint, const Stack& stack, int64_t layer,
                                   const Placement& placement) {
  const int64_t columns = stack.in_features;
  const at::Tensor weight = at::empty({stack.out_features, columns}, placement.dtype);
  const bool is_bf16 = placement.dtype == at::kBFloat16;
  const int64_t element_bytes = is_bf16 ? sizeof(BFloat16) : sizeof(float);
  auto* bytes = static_cast<uint8_t*>(weight.mutable_data_ptr());
  at::Tensor bias;
  if (stack.has_bias) bias = at::empty({stack.out_features}, at::kFloat);
  int64_t row = 0;
  for (const Part& part : stack.parts) {
    const WeightView view = checkpoint.weight(part.weight, layer);
    const RowOrder order{checkpoint.has_interleaved_rotary(part.weight) ? checkpoint.config().head_dim : 0};
    check_finite(view, checkpoint.path());
    const int64_t rows = view.shape[0], row_bytes = static_cast<int64_t>(view.bytes.size()) / rows;
    at::parallel_for(0, rows, kRowsPerStep, [&](int64_t begin, int64_t end) {
      std::vector<float> values(columns);
      for (int64_t r = begin; r < end; ++r) {
        const uint8_t* blocks = view.bytes.data() + r * row_bytes;
        uint8_t* out = bytes + (row + order(r)) * columns * element_bytes;
        if (is_bf16 && view.type == WeightType::kBF16) {
          std::memcpy(out, blocks, row_bytes);
          continue;
        }
        dequantise(view.type, blocks, columns, values.data());
        if (is_bf16) {
          std::transform(values.begin(), values.end(), reinterpret_cast<BFloat16*>(out), to_bf16);
        } else {
          std::memcpy(out, values.data(), columns * element_bytes);
        }
      }
    });
    checkpoint.release(view);
    if (stack.has_bias)
      bias.narrow(0, row, rows).copy_(load_vector(checkpoint, checkpoint.weight(part.bias, layer), order));
    row += rows;
  }
  return ops::plain_linear(weight.to(placement.device), bias.defined() ? bias.to(placement.device) : bias);
}

Stack embedding_stack(const Checkpoint& checkpoint, WeightId id, at::ScalarType dtype) {
  return plan_stack(checkpoint, {{id, id}}, false, 0, dtype);
}

struct LayerStacks {
  Stack qkv, attention_output, gate_up, down;
};
LayerStacks layer_stacks(const Checkpoint& checkpoint, int64_t layer, at::ScalarType dtype) {
  const ModelConfig& config = checkpoint.config();
  const auto stack = [&](std::vector<Part> parts, bool has_bias) {
    return plan_stack(checkpoint, std::move(parts), has_bias, layer, dtype);
  };
  return {stack({{WeightId::kQuery, WeightId::kQueryBias},
                 {WeightId::kKey, WeightId::kKeyBias},
                 {WeightId::kValue, WeightId::kValueBias}},
                config.qkv_bias),
          stack({{WeightId::kAttentionOutput, WeightId::kAttentionOutputBias}}, config.output_bias),
          stack({{WeightId::kGate, WeightId::kGate}, {WeightId::kUp, WeightId::kUp}}, false),
          stack({{WeightId::kDown, WeightId::kDown}}, false)};
}

// Of the arena that all packed matrices are taken from.
int64_t arena_bytes(const Checkpoint& checkpoint, at::ScalarType dtype) {
  const auto bytes = [](const Stack& stack) {
    return ops::PackedArena::size_in_bytes(stack.type, stack.out_features, stack.in_features);
  };
  int64_t sum = bytes(embedding_stack(checkpoint, WeightId::kEmbedding, dtype));
  if (!checkpoint.config().tied_embeddings) sum += bytes(embedding_stack(checkpoint, WeightId::kOutput, dtype));
  for (int64_t layer = 0; layer < checkpoint.config().num_layers; ++layer) {
    const LayerStacks stacks = layer_stacks(checkpoint, layer, dtype);
    sum += bytes(stacks.qkv) + bytes(stacks.attention_output) + bytes(stacks.gate_up) + bytes(stacks.down);
  }
  return sum;
}

// Offsets of the half-precision scales in a block, ended by -1.
const int* scale_offsets(WeightType type) {
  static constexpr int kFirst[] = {0, -1}, kFirstTwo[] = {0, 2, -1}, kLast[] = {208, -1};
  switch (type) {
    case WeightType::kQ4_1:
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      return kFirstTwo;
    case WeightType::kQ6_K:
      return kLast;
    default:
      return kFirst;  // Q4_0, Q8_0
  }
}

// Whether the half-precision scale at `offset` of every block has a finite exponent.
bool scales_finite(const uint8_t* blocks, int64_t count, int block_bytes, int offset) {
  constexpr uint16_t kExponent = 0x7c00u;
  bool finite = true;
  for (int64_t b = 0; b < count; ++b) {
    uint16_t bits = 0;
    std::memcpy(&bits, blocks + b * block_bytes + offset, sizeof bits);
    finite = finite && (bits & kExponent) != kExponent;
  }
  return finite;
}

// Whether every plain float, with bits that are a T, has a finite exponent. A loop that compilers vectorise: files have
// many gigabytes of them.
template <class T>
bool all_finite(std::span<const uint8_t> bytes, T exponent) {
  T bad = 0;
  for (size_t i = 0; i + sizeof(T) <= bytes.size(); i += sizeof(T)) {
    T bits = 0;
    std::memcpy(&bits, bytes.data() + i, sizeof(T));
    bad |= (bits & exponent) == exponent;
  }
  return bad == 0;
}

}  // namespace

int64_t Weights::size_in_bytes() const {
  const auto bytes = [](const at::Tensor& x) { return x.defined() ? static_cast<int64_t>(x.nbytes()) : 0; };
  int64_t sum = embedding.size_in_bytes() + bytes(final_norm);
  const bool is_tied = output.data.is_same(embedding.data) && output.plain.is_same(embedding.plain);
  if (!is_tied) sum += output.size_in_bytes();
  for (const LayerWeights& layer : layers) {
    sum += layer.qkv.size_in_bytes() + layer.attention_output.size_in_bytes() + layer.gate_up.size_in_bytes() +
           layer.down.size_in_bytes() + bytes(layer.attention_norm) + bytes(layer.ffn_norm) + bytes(layer.query_norm) +
           bytes(layer.key_norm);
  }
  return sum;
}

WeightType packed_type(const std::vector<WeightType>& types, int64_t in_features, at::ScalarType dtype) {
  const bool same = std::all_of(types.begin(), types.end(), [&](WeightType type) { return type == types.front(); });
  if (same && ops::can_pack(types.front())) return types.front();
  const auto is_four_bits = [](WeightType type) { return type == WeightType::kQ4_0 || type == WeightType::kQ4_1; };
  if (std::all_of(types.begin(), types.end(), is_four_bits)) return WeightType::kQ4_1;
  const auto is_exact_float = [&](WeightType type) {
    return type == WeightType::kF32 || type == WeightType::kBF16 || (type == WeightType::kF16 && dtype == at::kFloat);
  };
  const bool floats = std::all_of(types.begin(), types.end(), is_exact_float);
  return floats || in_features % layout(WeightType::kQ8_0).block_elements != 0 ? WeightType::kF32 : WeightType::kQ8_0;
}

void check_finite(const WeightView& view, const std::string& source) {
  const WeightLayout blocks = layout(view.type);
  const int64_t count = view.num_elements() / blocks.block_elements;
  bool finite = true;
  if (view.type == WeightType::kF32) {
    finite = all_finite<uint32_t>(view.bytes, 0x7f800000u);
  } else if (view.type == WeightType::kBF16) {
    finite = all_finite<uint16_t>(view.bytes, 0x7f80u);
  } else if (view.type == WeightType::kF16) {
    finite = all_finite<uint16_t>(view.bytes, 0x7c00u);
  } else {
    for (const int* offset = scale_offsets(view.type); *offset >= 0; ++offset) {
      finite = finite && scales_finite(view.bytes.data(), count, blocks.block_bytes, *offset);
    }
  }
  if (!finite) {
    throw_data("{}: tensor {} holds NaN or infinity; the file is damaged or was converted wrongly", source, view.name);
  }
}

int64_t planned_weight_bytes(const Checkpoint& checkpoint, const Placement& placement) {
  const ModelConfig& config = checkpoint.config();
  const int64_t vectors =
      (2 * config.num_layers + 1) * config.dim +
      config.num_layers * ((config.qkv_bias ? config.q_dim() + 2 * config.kv_dim() : 0) +
                           (config.output_bias ? config.dim : 0) + (config.qk_norm ? 2 * config.head_dim : 0));
  if (placement.plain) {
    const int64_t matrices = config.num_parameters() - vectors;
    return matrices * static_cast<int64_t>(c10::elementSize(placement.dtype)) + vectors * 4;
  }
  return arena_bytes(checkpoint, placement.dtype) + vectors * 4;
}

Weights load_weights(const Checkpoint& checkpoint, const Placement& placement) {
  const ModelConfig& config = checkpoint.config();
  const at::ScalarType dtype = placement.dtype;
  Weights weights;
  Notices notices;
  std::optional<ops::PackedArena> arena;
  if (!placement.plain) arena.emplace(arena_bytes(checkpoint, dtype));
  const auto matrix = [&](const Stack& stack, int64_t layer) {
    return arena ? load_stack(checkpoint, stack, layer, *arena, notices)
                 : load_plain_stack(checkpoint, stack, layer, placement);
  };
  const auto vector = [&](WeightId id, int64_t layer) {
    const std::optional<WeightView> view = checkpoint.find(id, layer);
    return view ? load_vector(checkpoint, *view).to(placement.device) : at::Tensor();
  };
  weights.embedding = matrix(embedding_stack(checkpoint, WeightId::kEmbedding, dtype), 0);
  weights.output =
      config.tied_embeddings ? weights.embedding : matrix(embedding_stack(checkpoint, WeightId::kOutput, dtype), 0);
  weights.final_norm = vector(WeightId::kFinalNorm, 0);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const LayerStacks stacks = layer_stacks(checkpoint, i, dtype);
    LayerWeights layer;
    layer.attention_norm = vector(WeightId::kAttentionNorm, i);
    layer.qkv = matrix(stacks.qkv, i);
    layer.query_norm = vector(WeightId::kQueryNorm, i);
    layer.key_norm = vector(WeightId::kKeyNorm, i);
    layer.attention_output = matrix(stacks.attention_output, i);
    layer.ffn_norm = vector(WeightId::kFfnNorm, i);
    layer.gate_up = matrix(stacks.gate_up, i);
    layer.down = matrix(stacks.down, i);
    weights.layers.push_back(std::move(layer));
  }
  for (const auto& [what, count] : notices)
    weights.notices.push_back(fmt::format("{} weights re-encoded: {}", count, what));
  return weights;
}

}  // namespace sparsek::model
