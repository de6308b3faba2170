#include "train/tensor_file.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "base/atomic_file.h"
#include "base/mapped_file.h"
#include "base/sha256.h"
#include "data/quote.h"
#include "data/safetensors.h"

namespace sparsek::train {
namespace {

struct ElementType {
  at::ScalarType type;
  const char* name;
};
constexpr ElementType kTypes[] = {{at::kFloat, "F32"}, {at::kDouble, "F64"}, {at::kBFloat16, "BF16"},
                                  {at::kHalf, "F16"},  {at::kLong, "I64"},   {at::kInt, "I32"},
                                  {at::kByte, "U8"},   {at::kBool, "BOOL"}};

const char* type_name(at::ScalarType type) {
  for (const ElementType& known : kTypes) {
    if (known.type == type) return known.name;
  }
  throw_data("tensors of type {} cannot be written", c10::toString(type));
}

}  // namespace

std::string write_tensors(const std::string& path, const NamedTensors& tensors,
                          const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t end = offset + static_cast<uint64_t>(tensor.nbytes());
    header[name] = {
        {"dtype", type_name(tensor.scalar_type())}, {"shape", tensor.sizes()}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');  // tensors begin 8-byte aligned
  const uint64_t header_bytes = text.size();

  AtomicFile file(path);
  Sha256 hash;
  const auto write = [&](const void* data, size_t size_bytes) {
    const std::span bytes(static_cast<const uint8_t*>(data), size_bytes);
    file.write(bytes);
    hash.update(bytes);
  };
  write(&header_bytes, sizeof(header_bytes));
  write(text.data(), text.size());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor here = tensor.cpu().contiguous();  // one at a time: a GPU's tensors need not fit twice
    write(here.const_data_ptr(), here.nbytes());
  }
  file.commit();
  return hash.hex();
}

std::map<std::string, at::Tensor> read_tensors(const std::string& path, const std::string& sha256) {
  if (!sha256.empty()) {
    const MappedFile bytes(path);
    if (const std::string found = sha256_of(bytes); found != sha256) {
      throw_data("{}: expected SHA-256 {}, found {}; the file is damaged", path, sha256, found);
    }
  }
  const SafetensorsFile file(path);
  std::map<std::string, at::Tensor> tensors;
  for (const SafetensorsEntry& entry : file.entries()) {
    const ElementType* type = nullptr;
    for (const ElementType& known : kTypes) {
      if (entry.dtype == known.name) type = &known;
    }
    if (type == nullptr) {
      throw_data("{}: tensor {}: unknown dtype {}", path, in_quotes(entry.name), in_quotes(entry.dtype));
    }
    at::Tensor tensor = at::empty(entry.shape, type->type);
    TORCH_CHECK(tensor.nbytes() == entry.bytes.size());
    std::memcpy(tensor.mutable_data_ptr(), entry.bytes.data(), entry.bytes.size());
    tensors.emplace(entry.name, std::move(tensor));
  }
  return tensors;
}

}  // namespace sparsek::train
