#include "ops/transformer_ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>

#include <limits>

#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/elementwise/elementwise.h"
#include "kernels/cpu/linear/linear.h"
#include "ops/plain_ops.h"

namespace sparsek::ops {
namespace {

constexpr uintptr_t kLargePageBytes = uintptr_t{2} << 20;

void check_device(const Tensor& x, const char* what) {
  TORCH_CHECK(x.device().is_cpu(), what, ": expected a CPU tensor, got one on ", x.device());
}

DType float_dtype(const Tensor& x, const char* what) {
  check_device(x, what);
  if (x.scalar_type() == at::kFloat) return DType::kF32;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, what, ": expected float32 or bfloat16, got ", x.scalar_type());
  return DType::kBF16;
}

void check_matrix(const Tensor& x, int64_t columns, const char* what) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, what, ": expected [rows, ", columns, "], got ", x.sizes());
  TORCH_CHECK(x.stride(1) == 1, what, ": the last dimension must be contiguous");
}

const float* float_vector(const Tensor& x, int64_t size, const char* what) {
  check_device(x, what);
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 1 && x.size(0) == size && x.is_contiguous(), what,
              ": expected contiguous float32 [", size, "], got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}

const int32_t* int_vector(const Tensor& x, int64_t size, const char* what) {
  check_device(x, what);
  TORCH_CHECK(x.scalar_type() == at::kInt && x.dim() == 1 && x.size(0) == size && x.is_contiguous(), what,
              ": expected contiguous int32 [", size, "], got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<int32_t>();
}

// int32 [rows], each in [0, high).
const int32_t* check_ids(const Tensor& ids, int64_t rows, int64_t high, const char* what) {
  const int32_t* data = int_vector(ids, rows, what);
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK(data[i] >= 0 && data[i] < high, what, ": expected values in [0, ", high, "), got ", data[i], " at ", i);
  }
  return data;
}

cpu::PackedWeight kernel_weight(const PackedLinear& weight) {
  return {weight.type, weight.out_features, weight.in_features, weight.data.const_data_ptr<uint8_t>()};
}

void run_linear(const Tensor& x, const PackedLinear& weight, Tensor& y, bool add) {
  check_matrix(x, weight.in_features, "linear input");
  check_matrix(y, weight.out_features, "linear output");
  TORCH_CHECK(x.size(0) == y.size(0), "linear: input has ", x.size(0), " rows, output ", y.size(0));
  if (weight.plain.defined()) return add ? plain::linear_add_(y, x, weight) : plain::linear_out(x, weight, y);
  cpu::LinearParams params;
  params.weight = kernel_weight(weight);
  params.x_dtype = float_dtype(x, "linear input");
  params.y_dtype = float_dtype(y, "linear output");
  TORCH_CHECK(!add || params.y_dtype == DType::kF32, "linear: adding needs a float32 output");
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.bias = weight.bias.defined() ? float_vector(weight.bias, weight.out_features, "linear bias") : nullptr;
  params.rows = x.size(0);
  params.x_stride = x.stride(0);
  params.y_stride = y.stride(0);
  params.add_to_y = add;
  cpu::linear(params);
}

Strides strides(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

void check_heads(const Tensor& x, int64_t rows, int64_t heads, int64_t head_dim, at::ScalarType dtype,
                 const char* what) {
  check_device(x, what);
  TORCH_CHECK(x.dim() == 4 && x.size(0) == 1 && x.size(1) == rows && x.size(2) == heads && x.size(3) == head_dim, what,
              ": expected [1, ", rows, ", ", heads, ", ", head_dim, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == dtype && x.stride(3) == 1, what, ": expected ", dtype,
              " with a contiguous last dimension, got ", x.scalar_type(), " with strides ", x.strides());
}

}  // namespace

int64_t PackedLinear::size_in_bytes() const {
  const auto bytes = [](const Tensor& x) { return x.defined() ? static_cast<int64_t>(x.nbytes()) : 0; };
  return bytes(data) + bytes(bias) + bytes(plain);
}

PackedLinear plain_linear(const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(weight.dim() == 2, "a weight must be [out_features, in_features], got ", weight.sizes());
  const WeightType type = weight.scalar_type() == at::kBFloat16 ? WeightType::kBF16 : WeightType::kF32;
  return {type, weight.size(0), weight.size(1), {}, bias, weight};
}

bool can_pack(WeightType type) {
  return cpu::can_pack(type);
}

int64_t packed_size_bytes(WeightType type, int64_t out_features, int64_t in_features) {
  return static_cast<int64_t>(cpu::packed_size_bytes(type, out_features, in_features));
}

PackedLinear empty_packed(WeightType type, int64_t out_features, int64_t in_features) {
  return PackedArena(PackedArena::size_in_bytes(type, out_features, in_features)).take(type, out_features, in_features);
}

PackedArena::PackedArena(int64_t size_bytes) : bytes_(at::empty({size_bytes}, at::kByte)) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(bytes_.mutable_data_ptr()), end = begin + size_bytes;
  TORCH_CHECK(begin % cpu::kPackAlignment == 0, "torch's allocator aligns to less than ", cpu::kPackAlignment,
              " bytes");
  const uintptr_t first = (begin + kLargePageBytes - 1) / kLargePageBytes * kLargePageBytes;
  const uintptr_t last = end / kLargePageBytes * kLargePageBytes;
  // Advice: where the system has no large pages, nothing is lost.
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int64_t PackedArena::size_in_bytes(WeightType type, int64_t out_features, int64_t in_features) {
  const int64_t size = packed_size_bytes(type, out_features, in_features);
  return (size + cpu::kPackAlignment - 1) / cpu::kPackAlignment * cpu::kPackAlignment;
}

PackedLinear PackedArena::take(WeightType type, int64_t out_features, int64_t in_features) {
  TORCH_CHECK(can_pack(type), "weights of type ", name(type), " cannot be packed");
  TORCH_CHECK(in_features % layout(type).block_elements == 0, name(type), " needs rows of a multiple of ",
              layout(type).block_elements, " values, got ", in_features);
  PackedLinear weight{type, out_features, in_features, {}, {}, {}};
  weight.data = bytes_.narrow(0, used_bytes_, packed_size_bytes(type, out_features, in_features));
  used_bytes_ += size_in_bytes(type, out_features, in_features);
  return weight;
}

void pack_rows(PackedLinear& weight, int64_t row_begin, int64_t count, const uint8_t* blocks) {
  TORCH_CHECK(row_begin >= 0 && count >= 0 && row_begin + count <= weight.out_features, "pack_rows: rows ", row_begin,
              " to ", row_begin + count, " of ", weight.out_features);
  cpu::pack_rows(weight.type, weight.out_features, weight.in_features, row_begin, count, blocks,
                 weight.data.mutable_data_ptr<uint8_t>());
}

void linear_out(const Tensor& x, const PackedLinear& weight, Tensor& y) {
  run_linear(x, weight, y, false);
}

void linear_add_(Tensor& y, const Tensor& x, const PackedLinear& weight) {
  run_linear(x, weight, y, true);
}

void embedding_out(const Tensor& ids, const PackedLinear& weight, Tensor& y) {
  check_matrix(y, weight.in_features, "embedding output");
  const int32_t* rows = ids.is_cpu() ? check_ids(ids, y.size(0), weight.out_features, "token ids") : nullptr;
  if (weight.plain.defined()) return plain::embedding_out(ids, weight, y);
  TORCH_CHECK(float_dtype(y, "embedding output") == DType::kF32, "embedding output: expected float32");
  const cpu::PackedWeight packed = kernel_weight(weight);
  float* out = y.mutable_data_ptr<float>();
  for (int64_t t = 0; t < y.size(0); ++t) cpu::dequantise_row(packed, rows[t], out + t * y.stride(0));
}

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  check_matrix(x, x.size(-1), "rms_norm input");
  check_matrix(out, x.size(1), "rms_norm output");
  if (plain::is_chosen(x)) return plain::rms_norm_out(x, weight, eps, out);
  TORCH_CHECK(float_dtype(x, "rms_norm input") == DType::kF32, "rms_norm input: expected float32");
  TORCH_CHECK(x.size(0) == out.size(0), "rms_norm: input has ", x.size(0), " rows, output ", out.size(0));
  cpu::RmsNormParams params;
  params.x = const_cast<float*>(x.const_data_ptr<float>());  // written only with y
  params.weight = float_vector(weight, x.size(1), "rms_norm weight");
  params.out = out.mutable_data_ptr();
  params.out_dtype = float_dtype(out, "rms_norm output");
  params.x_stride = x.stride(0);
  params.out_stride = out.stride(0);
  params.rows = static_cast<int32_t>(x.size(0));
  params.dim = static_cast<int32_t>(x.size(1));
  params.eps = static_cast<float>(eps);
  cpu::rms_norm(params);
}

void head_norm_(Tensor& x, const Tensor& weight, double eps) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "head_norm: expected [tokens, heads, head_dim], got ", x.sizes());
  if (plain::is_chosen(x)) return plain::head_norm_(x, weight, eps);
  cpu::HeadNormParams params;
  params.dtype = float_dtype(x, "head_norm input");
  params.x = x.mutable_data_ptr();
  params.weight = float_vector(weight, x.size(2), "head_norm weight");
  params.token_stride = x.stride(0);
  params.head_stride = x.stride(1);
  params.tokens = static_cast<int32_t>(x.size(0));
  params.heads = static_cast<int32_t>(x.size(1));
  params.head_dim = static_cast<int32_t>(x.size(2));
  params.eps = static_cast<float>(eps);
  cpu::head_norm(params);
}

std::pair<Tensor, Tensor> rotary_table(int64_t first_position, int64_t count,
                                       const std::vector<double>& inverse_frequencies) {
  const int64_t half = static_cast<int64_t>(inverse_frequencies.size());
  Tensor cos = at::empty({count, half}, at::kFloat), sin = at::empty({count, half}, at::kFloat);
  cpu::rotary_table(first_position, static_cast<int32_t>(count), inverse_frequencies.data(), static_cast<int32_t>(half),
                    cos.mutable_data_ptr<float>(), sin.mutable_data_ptr<float>());
  return {std::move(cos), std::move(sin)};
}

void rotary_out(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor& out) {
  TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "rotary: expected [tokens, heads, head_dim], got ", x.sizes());
  TORCH_CHECK(out.sizes() == x.sizes() && out.stride(2) == 1 && out.scalar_type() == x.scalar_type(),
              "rotary: the output must be like the input ", x.sizes(), ", got ", out.sizes());
  if (plain::is_chosen(x)) return plain::rotary_out(x, cos, sin, out);
  TORCH_CHECK(cos.dim() == 2 && cos.is_contiguous() && sin.is_contiguous() && cos.sizes() == sin.sizes() &&
                  cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat && cos.size(1) * 2 == x.size(2) &&
                  (cos.size(0) == x.size(0) || cos.size(0) == 1),
              "rotary: expected float32 cosines and sines of [", x.size(0), " or 1, ", x.size(2) / 2, "], got ",
              cos.sizes());
  check_device(cos, "rotary cosines");
  check_device(out, "rotary output");
  cpu::RotaryParams params;
  params.dtype = float_dtype(x, "rotary input");
  params.x = x.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.cos = cos.const_data_ptr<float>();
  params.sin = sin.const_data_ptr<float>();
  params.x_token_stride = x.stride(0);
  params.x_head_stride = x.stride(1);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.angle_stride = cos.size(0) == 1 ? 0 : cos.size(1);
  params.tokens = static_cast<int32_t>(x.size(0));
  params.heads = static_cast<int32_t>(x.size(1));
  params.head_dim = params.rotary_dim = static_cast<int32_t>(x.size(2));
  cpu::rotary(params);
}

Tensor swiglu_(Tensor& gate_up) {
  check_matrix(gate_up, gate_up.size(-1), "swiglu input");
  TORCH_CHECK(gate_up.size(1) % 2 == 0, "swiglu input: expected [rows, 2 * ffn], got ", gate_up.sizes());
  if (plain::is_chosen(gate_up)) return plain::swiglu_(gate_up);
  const int64_t ffn = gate_up.size(1) / 2;
  Tensor gate = gate_up.narrow(1, 0, ffn);
  const Tensor up = gate_up.narrow(1, ffn, ffn);
  cpu::SwigluParams params;
  params.dtype = float_dtype(gate_up, "swiglu input");
  params.gate = gate.const_data_ptr();
  params.up = up.const_data_ptr();
  params.out = gate.mutable_data_ptr();
  params.gate_stride = params.up_stride = params.out_stride = gate_up.stride(0);
  params.rows = static_cast<int32_t>(gate_up.size(0));
  params.ffn = static_cast<int32_t>(ffn);
  cpu::swiglu(params);
  return gate;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets) {
  check_matrix(logits, logits.size(-1), "logits");
  const int32_t* rows = check_ids(targets, logits.size(0), logits.size(1), "targets");
  if (plain::is_chosen(logits)) return plain::cross_entropy(logits, targets);
  TORCH_CHECK(float_dtype(logits, "logits") == DType::kF32, "logits: expected float32");
  Tensor loss = at::empty({logits.size(0)}, at::kDouble);
  cpu::CrossEntropyParams params;
  params.logits = logits.const_data_ptr<float>();
  params.targets = rows;
  params.loss = loss.mutable_data_ptr<double>();
  params.logits_stride = logits.stride(0);
  params.rows = static_cast<int32_t>(logits.size(0));
  params.vocab = static_cast<int32_t>(logits.size(1));
  cpu::cross_entropy(params);
  return loss;
}

Tensor row_attention(const RowAttentionInputs& in) {
  TORCH_CHECK(in.q.dim() == 4 && in.k.dim() == 4, "row_attention: q and k must have four dimensions");
  const int64_t tokens = in.q.size(1), rows = in.k.size(1), num_heads = in.q.size(2), num_kv_heads = in.k.size(2);
  const int64_t head_dim = in.q.size(3);
  const at::ScalarType dtype = in.q.scalar_type();
  TORCH_CHECK(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "row_attention: ", num_heads, " heads over ",
              num_kv_heads, " key-value heads");
  TORCH_CHECK(in.num_carried >= 0 && in.num_carried + tokens == rows, "row_attention: ", rows, " key rows for ",
              in.num_carried, " carried rows and ", tokens, " tokens");
  if (plain::is_chosen(in.q)) return plain::row_attention(in);
  AttentionFwdParams params{};
  params.dtype = float_dtype(in.q, "q");
  check_heads(in.q, tokens, num_heads, head_dim, dtype, "q");
  check_heads(in.k, rows, num_kv_heads, head_dim, dtype, "k");
  check_heads(in.v, rows, num_kv_heads, head_dim, dtype, "v");
  TORCH_CHECK(in.q_far.defined() == in.k_far.defined(), "row_attention: q_far and k_far come together");
  if (in.q_far.defined()) {
    check_heads(in.q_far, tokens, num_heads, head_dim, dtype, "q_far");
    check_heads(in.k_far, rows, num_kv_heads, head_dim, dtype, "k_far");
    params.q_far = in.q_far.const_data_ptr();
    params.k_far = in.k_far.const_data_ptr();
    params.q_far_strides = strides(in.q_far);
    params.k_far_strides = strides(in.k_far);
  }
  // Weight 1 everywhere: scores +inf, threshold 0, and far bounds the same for every head.
  const Tensor scores = at::full({num_kv_heads, rows}, std::numeric_limits<float>::infinity(), at::kFloat);
  const Tensor tau = at::zeros({num_kv_heads, tokens}, at::kFloat);
  Tensor far_begin = at::zeros({num_kv_heads, rows}, at::kInt), far_end = at::zeros({num_kv_heads, rows}, at::kInt);
  if (in.far_begin.defined()) {
    int_vector(in.far_begin, rows, "far_begin");
    int_vector(in.far_end, rows, "far_end");
    far_begin.copy_(in.far_begin.expand({num_kv_heads, rows}));
    far_end.copy_(in.far_end.expand({num_kv_heads, rows}));
  }
  Tensor out = at::empty({1, tokens, num_heads, head_dim}, dtype);
  const Tensor softmax_lse = at::empty({1, num_heads, tokens}, at::kFloat);
  params.q = in.q.const_data_ptr();
  params.k = in.k.const_data_ptr();
  params.v = in.v.const_data_ptr();
  params.scores = scores.const_data_ptr();
  params.tau = tau.const_data_ptr();
  const Tensor window_begin = in.window_begin.defined() ? in.window_begin : at::zeros({tokens}, at::kInt);
  params.window_begin = int_vector(window_begin, tokens, "window_begin");
  params.far_begin = far_begin.const_data_ptr<int32_t>();
  params.far_end = far_end.const_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.softmax_lse = softmax_lse.mutable_data_ptr();
  params.q_strides = strides(in.q);
  params.k_strides = strides(in.k);
  params.v_strides = strides(in.v);
  params.out_strides = strides(out);
  params.batch = 1;
  params.seqlen_q = static_cast<int32_t>(tokens);
  params.seqlen_k = static_cast<int32_t>(rows);
  params.num_carried = static_cast<int32_t>(in.num_carried);
  params.num_heads = static_cast<int32_t>(num_heads);
  params.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.gate = Gate::kHard;
  params.softmax_scale = static_cast<float>(in.softmax_scale);
  cpu::attention_forward(params);
  return out;
}

}  // namespace sparsek::ops
