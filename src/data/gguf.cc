#include "data/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "base/error.h"
#include "data/quote.h"

namespace sparsek {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF numbers are read as they lie");

enum GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};
constexpr uint32_t kNumValueTypes = 13;
constexpr const char* kValueTypeNames[kNumValueTypes] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                                         "int32",  "float32", "bool",   "string", "array",
                                                         "uint64", "int64",   "float64"};
// Bytes of one value; a string takes at least its length field.
constexpr uint64_t kValueBytes[kNumValueTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};

std::string value_type_name(uint32_t type) {
  return type < kNumValueTypes ? kValueTypeNames[type] : fmt::format("type {}", type);
}

// Tensor types by the numbers that GGUF gives them. Those without a WeightType are only known by name.
struct TensorType {
  const char* name;
  uint32_t number;
  std::optional<WeightType> weight;
};
constexpr TensorType kTensorTypes[] = {
    {"F32", 0, WeightType::kF32},
    {"F16", 1, WeightType::kF16},
    {"Q4_0", 2, WeightType::kQ4_0},
    {"Q4_1", 3, WeightType::kQ4_1},
    {"Q5_0", 6, {}},
    {"Q5_1", 7, {}},
    {"Q8_0", 8, WeightType::kQ8_0},
    {"Q8_1", 9, {}},
    {"Q2_K", 10, {}},
    {"Q3_K", 11, {}},
    {"Q4_K", 12, WeightType::kQ4_K},
    {"Q5_K", 13, WeightType::kQ5_K},
    {"Q6_K", 14, WeightType::kQ6_K},
    {"Q8_K", 15, {}},
    {"IQ2_XXS", 16, {}},
    {"IQ2_XS", 17, {}},
    {"IQ3_XXS", 18, {}},
    {"IQ1_S", 19, {}},
    {"IQ4_NL", 20, {}},
    {"IQ3_S", 21, {}},
    {"IQ2_S", 22, {}},
    {"IQ4_XS", 23, {}},
    {"I8", 24, {}},
    {"I16", 25, {}},
    {"I32", 26, {}},
    {"I64", 27, {}},
    {"F64", 28, {}},
    {"IQ1_M", 29, {}},
    {"BF16", 30, WeightType::kBF16},
    {"TQ1_0", 34, {}},
    {"TQ2_0", 35, {}},
    {"MXFP4", 39, {}},
    {"NVFP4", 40, {}},
    {"Q1_0", 41, {}},
};

WeightType weight_type(uint32_t number, std::string_view tensor, const std::string& path) {
  for (const TensorType& type : kTensorTypes) {
    if (type.number != number) continue;
    if (type.weight) return *type.weight;
    throw_data(
        "{}: tensor {}: expected type F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K, found {}; "
        "convert the model to one of these",
        path, in_quotes(tensor), type.name);
  }
  throw_data(
      "{}: tensor {}: expected type F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K or Q6_K, found unknown type {}; "
      "convert the model to one of these",
      path, in_quotes(tensor), number);
}

template <class T>
T load(std::span<const uint8_t> bytes, uint64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

// Reads forward through the file and refuses to pass its end.
struct Cursor {
  std::span<const uint8_t> bytes;
  const std::string& path;
  uint64_t position = 0;

  uint64_t left() const { return bytes.size() - position; }

  void need(uint64_t count, const char* what) const {
    if (count > left()) {
      throw_data("{}: truncated: expected {} bytes for {} at offset {}, found {}; fetch the file again", path, count,
                 what, position, left());
    }
  }
  template <class T>
  T read(const char* what) {
    need(sizeof(T), what);
    const T value = load<T>(bytes, position);
    position += sizeof(T);
    return value;
  }
  std::string_view read_string(const char* what) {
    const auto length = read<uint64_t>(what);
    need(length, what);
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + position, length);
    position += length;
    return text;
  }
  // A count of things of at least `min_bytes` each, refused when the rest of the file cannot hold that many.
  uint64_t read_count(uint64_t min_bytes, const char* what) {
    const uint64_t at = position;
    const auto count = read<uint64_t>(what);
    check_count(count, min_bytes, at, what);
    return count;
  }
  void check_count(uint64_t count, uint64_t min_bytes, uint64_t at, const char* what) const {
    if (count > left() / min_bytes) {
      throw_data(
          "{}: {} at offset {} is {}, but the {} bytes after it hold at most {}; the file is damaged or truncated",
          path, what, at, count, left(), left() / min_bytes);
    }
  }
};

}  // namespace

GgufFile::GgufFile(const std::string& path) : path_(path), file_(path) {
  bytes_ = file_->bytes();
  parse();
}

GgufFile GgufFile::from_bytes(std::span<const uint8_t> bytes, std::string name) {
  GgufFile file;
  file.path_ = std::move(name);
  file.bytes_ = bytes;
  file.parse();
  return file;
}

void GgufFile::parse() {
  Cursor cursor{bytes_, path_};
  if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
    throw_data("{}: expected a GGUF file (first bytes 'GGUF'), found {}", path_,
               in_quotes({reinterpret_cast<const char*>(bytes_.data()), std::min<size_t>(bytes_.size(), 4)}));
  }
  cursor.position = 4;
  const auto version = cursor.read<uint32_t>("the version");
  if (version == 0x03000000) throw_data("{}: expected a little-endian GGUF file, found a big-endian one", path_);
  if (version != 3) throw_data("{}: expected GGUF version 3, found version {}; convert the file again", path_, version);
  const uint64_t num_tensors = cursor.read_count(32, "the tensor count");   // a tensor's description takes >= 32 bytes
  const uint64_t num_values = cursor.read_count(13, "the metadata count");  // length, type and one byte

  keys_.reserve(num_values);
  values_.reserve(num_values);
  for (uint64_t i = 0; i < num_values; ++i) {
    const std::string_view key = cursor.read_string("a metadata key");
    Value value;
    value.type = cursor.read<uint32_t>("a metadata type");
    if (value.type >= kNumValueTypes) {
      throw_data("{}: metadata {}: expected a value type below {}, found {}; the file is damaged", path_,
                 in_quotes(key), kNumValueTypes, value.type);
    }
    value.count = 1;
    value.element_type = value.type;
    if (value.type == kArray) {
      value.element_type = cursor.read<uint32_t>("an array's type");
      if (value.element_type >= kNumValueTypes || value.element_type == kArray) {
        throw_data("{}: metadata {}: expected an array of numbers or strings, found elements of {}", path_,
                   in_quotes(key), value_type_name(value.element_type));
      }
      value.count = cursor.read_count(kValueBytes[value.element_type], "an array's length");
    }
    value.offset = cursor.position;
    if (value.element_type == kString) {
      for (uint64_t j = 0; j < value.count; ++j) cursor.read_string("a metadata string");
    } else {
      const uint64_t size = value.count * kValueBytes[value.element_type];  // cannot overflow: count fits the file
      cursor.need(size, "a metadata value");
      cursor.position += size;
    }
    if (!values_.emplace(key, value).second) throw_data("{}: metadata key {} appears twice", path_, in_quotes(key));
    keys_.push_back(key);
  }

  const int64_t alignment = find_int("general.alignment").value_or(32);
  if (alignment < 8 || alignment > (1 << 20) || (alignment & (alignment - 1)) != 0) {
    throw_data("{}: general.alignment: expected a power of two from 8 to 1048576, found {}", path_, alignment);
  }

  struct Extent {
    uint64_t begin, end;
    size_t tensor;
  };
  std::vector<Extent> extents;
  extents.reserve(num_tensors);
  tensors_.reserve(num_tensors);
  tensor_index_.reserve(num_tensors);
  for (uint64_t i = 0; i < num_tensors; ++i) {
    const std::string_view name = cursor.read_string("a tensor's name");
    const auto num_dims = cursor.read<uint32_t>("a tensor's dimension count");
    if (num_dims < 1 || num_dims > 4) {
      throw_data("{}: tensor {}: expected 1 to 4 dimensions, found {}", path_, in_quotes(name), num_dims);
    }
    WeightView tensor;
    tensor.name = name;
    tensor.shape.resize(num_dims);
    constexpr uint64_t kMaxElements = uint64_t{1} << 48;
    uint64_t num_elements = 1;
    for (uint32_t d = 0; d < num_dims; ++d) {
      const auto size = cursor.read<uint64_t>("a tensor's dimension");
      if (size < 1 || size > kMaxElements / num_elements) {
        throw_data("{}: tensor {}: dimension {} is {}: expected 1 or more, at most 2^48 elements in all", path_,
                   in_quotes(name), d, size);
      }
      num_elements *= size;
      tensor.shape[num_dims - 1 - d] = static_cast<int64_t>(size);  // GGUF says the contiguous dimension first
    }
    tensor.type = weight_type(cursor.read<uint32_t>("a tensor's type"), name, path_);
    const WeightLayout block = layout(tensor.type);
    if (tensor.shape.back() % block.block_elements != 0) {
      throw_data("{}: tensor {}: expected rows of a multiple of {} values for {}, found shape {}", path_,
                 in_quotes(name), block.block_elements, block.name, shape_text(tensor.shape));
    }
    const auto offset = cursor.read<uint64_t>("a tensor's offset");
    if (offset % static_cast<uint64_t>(alignment) != 0) {
      throw_data("{}: tensor {}: expected an offset aligned to {} bytes, found {}", path_, in_quotes(name), alignment,
                 offset);
    }
    const uint64_t size_bytes =
        num_elements / static_cast<uint64_t>(block.block_elements) * static_cast<uint64_t>(block.block_bytes);
    if (offset > bytes_.size() || size_bytes > bytes_.size() - offset) {
      throw_data("{}: tensor {}: {} bytes at data offset {} lie past the end of the file ({} bytes); fetch it again",
                 path_, in_quotes(name), size_bytes, offset, bytes_.size());
    }
    if (!tensor_index_.emplace(name, tensors_.size()).second) {
      throw_data("{}: tensor {} appears twice", path_, in_quotes(name));
    }
    extents.push_back({offset, offset + size_bytes, tensors_.size()});
    tensors_.push_back(std::move(tensor));
  }

  // The data begins at the next aligned byte after the descriptions.
  const auto mask = static_cast<uint64_t>(alignment) - 1;
  const uint64_t data_begin = (cursor.position + mask) & ~mask;
  const uint64_t data_bytes = bytes_.size() - std::min<uint64_t>(bytes_.size(), data_begin);
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    WeightView& tensor = tensors_[extent.tensor];
    if (extent.end > data_bytes) {
      throw_data(
          "{}: tensor {} ends at data offset {}, but the file has {} bytes of data; it is truncated: fetch it again",
          path_, in_quotes(tensor.name), extent.end, data_bytes);
    }
    if (i > 0 && extent.begin < extents[i - 1].end) {
      throw_data("{}: tensors {} and {} overlap at data offset {}", path_,
                 in_quotes(tensors_[extents[i - 1].tensor].name), in_quotes(tensor.name), extent.begin);
    }
    tensor.bytes = bytes_.subspan(data_begin + extent.begin, extent.end - extent.begin);
  }
}

const GgufFile::Value* GgufFile::find(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

bool GgufFile::contains(std::string_view key) const {
  return find(key) != nullptr;
}
std::vector<std::string_view> GgufFile::keys() const {
  return keys_;
}

void GgufFile::throw_missing(std::string_view key) const {
  throw_data("{}: expected metadata {}, found none; the file is no complete model", path_, in_quotes(key));
}

void GgufFile::throw_wrong_type(std::string_view key, const Value& value, std::string_view wanted) const {
  std::string found = value_type_name(value.type);
  if (value.type == kArray) found += " of " + value_type_name(value.element_type);
  throw_data("{}: metadata {}: expected {}, found {}", path_, in_quotes(key), wanted, found);
}

// Value types hold their bytes at offsets that parse() has checked.
namespace {

std::optional<int64_t> integer_at(std::span<const uint8_t> bytes, uint32_t type, uint64_t offset) {
  switch (type) {
    case kUint8:
      return load<uint8_t>(bytes, offset);
    case kInt8:
      return load<int8_t>(bytes, offset);
    case kUint16:
      return load<uint16_t>(bytes, offset);
    case kInt16:
      return load<int16_t>(bytes, offset);
    case kUint32:
      return load<uint32_t>(bytes, offset);
    case kInt32:
      return load<int32_t>(bytes, offset);
    case kInt64:
      return load<int64_t>(bytes, offset);
    case kUint64: {
      const auto value = load<uint64_t>(bytes, offset);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

std::optional<double> float_at(std::span<const uint8_t> bytes, uint32_t type, uint64_t offset) {
  if (type == kFloat32) return load<float>(bytes, offset);
  if (type == kFloat64) return load<double>(bytes, offset);
  if (const auto value = integer_at(bytes, type, offset)) return static_cast<double>(*value);
  return std::nullopt;
}

}  // namespace

std::string_view GgufFile::string_at(uint64_t offset) const {
  return {reinterpret_cast<const char*>(bytes_.data()) + offset + 8, load<uint64_t>(bytes_, offset)};
}

void GgufFile::check_array(std::string_view key, const Value& value, std::string_view wanted) const {
  if (value.type != kArray) throw_wrong_type(key, value, wanted);
}

std::optional<int64_t> GgufFile::find_int(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto number = integer_at(bytes_, value->type, value->offset);
  if (!number) throw_wrong_type(key, *value, "an integer below 2^63");
  return number;
}

std::optional<double> GgufFile::find_float(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto number = float_at(bytes_, value->type, value->offset);
  if (!number) throw_wrong_type(key, *value, "a number");
  return number;
}

std::optional<bool> GgufFile::find_bool(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != kBool) throw_wrong_type(key, *value, "a bool");
  return load<uint8_t>(bytes_, value->offset) != 0;
}

std::optional<std::string_view> GgufFile::find_string(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != kString) throw_wrong_type(key, *value, "a string");
  return string_at(value->offset);
}

std::optional<std::vector<std::string_view>> GgufFile::find_strings(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  check_array(key, *value, "an array of strings");
  if (value->element_type != kString) {
    throw_wrong_type(key, *value, "an array of strings");
  }
  std::vector<std::string_view> strings;
  strings.reserve(value->count);
  uint64_t offset = value->offset;
  for (uint64_t i = 0; i < value->count; ++i) {
    strings.push_back(string_at(offset));
    offset += 8 + strings.back().size();
  }
  return strings;
}

std::optional<std::vector<int64_t>> GgufFile::find_ints(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  check_array(key, *value, "an array of integers");
  std::vector<int64_t> numbers;
  numbers.reserve(value->count);
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto number = integer_at(bytes_, value->element_type, value->offset + i * kValueBytes[value->element_type]);
    if (!number) throw_wrong_type(key, *value, "an array of integers below 2^63");
    numbers.push_back(*number);
  }
  return numbers;
}

std::optional<std::vector<float>> GgufFile::find_floats(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  check_array(key, *value, "an array of numbers");
  std::vector<float> numbers;
  numbers.reserve(value->count);
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto number = float_at(bytes_, value->element_type, value->offset + i * kValueBytes[value->element_type]);
    if (!number) throw_wrong_type(key, *value, "an array of numbers");
    numbers.push_back(static_cast<float>(*number));
  }
  return numbers;
}

int64_t GgufFile::get_int(std::string_view key) const {
  if (const auto value = find_int(key)) return *value;
  throw_missing(key);
}
double GgufFile::get_float(std::string_view key) const {
  if (const auto value = find_float(key)) return *value;
  throw_missing(key);
}
bool GgufFile::get_bool(std::string_view key) const {
  if (const auto value = find_bool(key)) return *value;
  throw_missing(key);
}
std::string_view GgufFile::get_string(std::string_view key) const {
  if (const auto value = find_string(key)) return *value;
  throw_missing(key);
}
std::vector<std::string_view> GgufFile::get_strings(std::string_view key) const {
  if (auto value = find_strings(key)) return *std::move(value);
  throw_missing(key);
}
std::vector<int64_t> GgufFile::get_ints(std::string_view key) const {
  if (auto value = find_ints(key)) return *std::move(value);
  throw_missing(key);
}
std::vector<float> GgufFile::get_floats(std::string_view key) const {
  if (auto value = find_floats(key)) return *std::move(value);
  throw_missing(key);
}

const WeightView* GgufFile::find_tensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

const WeightView& GgufFile::tensor(std::string_view name) const {
  if (const WeightView* tensor = find_tensor(name)) return *tensor;
  throw_data("{}: expected tensor {}, found none among the file's {}", path_, in_quotes(name), tensors_.size());
}

void GgufFile::release_pages(const WeightView& tensor) const {
  if (file_) file_->release_pages(static_cast<size_t>(tensor.bytes.data() - bytes_.data()), tensor.bytes.size());
}

}  // namespace sparsek
