#include "data/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "data/json_file.h"
#include "data/quote.h"

namespace sparsek {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr uint64_t kMaxElements = uint64_t{1} << 48;

struct ElementType {
  std::string_view name;
  uint64_t bytes;
};
constexpr ElementType kElementTypes[] = {{"F64", 8},  {"F32", 4}, {"F16", 2},     {"BF16", 2},   {"I64", 8}, {"I32", 4},
                                         {"I16", 2},  {"I8", 1},  {"U64", 8},     {"U32", 4},    {"U16", 2}, {"U8", 1},
                                         {"BOOL", 1}, {"C64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};

// Bytes of one element; 0 for a type not known here, which may be listed but not checked.
uint64_t element_bytes(std::string_view dtype) {
  for (const ElementType& type : kElementTypes) {
    if (type.name == dtype) return type.bytes;
  }
  return 0;
}

uint64_t unsigned_number(const nlohmann::json& json, const std::string& path, const std::string& tensor) {
  if (!json.is_number_unsigned()) {
    throw_data("{}: tensor {}: expected sizes and offsets of 0 or more, found {}", path, in_quotes(tensor),
               json.type_name());
  }
  return json.get<uint64_t>();
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  bytes_ = file_->bytes();
  parse();
}

SafetensorsFile SafetensorsFile::from_bytes(std::span<const uint8_t> bytes, std::string name) {
  SafetensorsFile file;
  file.path_ = std::move(name);
  file.bytes_ = bytes;
  file.parse();
  return file;
}

void SafetensorsFile::parse() {
  if (bytes_.size() < 8) throw_data("{}: expected a safetensors file, found only {} bytes", path_, bytes_.size());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes_.data(), 8);
  if (header_bytes > std::min<uint64_t>(bytes_.size() - 8, kMaxHeaderBytes)) {
    throw_data(
        "{}: expected a safetensors header inside the file ({} bytes, at most {}), found a length of {}; the file is "
        "truncated or of another kind",
        path_, bytes_.size(), kMaxHeaderBytes, header_bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + 8, header_bytes);
  const nlohmann::json header = parse_json(text, path_);
  if (!header.is_object()) throw_data("{}: expected a JSON object as header, found {}", path_, header.type_name());
  const std::span<const uint8_t> data = bytes_.subspan(8 + header_bytes);

  for (const auto& [name, description] : header.items()) {
    if (name == "__metadata__") {
      if (!description.is_object())
        throw_data("{}: __metadata__: expected an object, found {}", path_, description.type_name());
      for (const auto& [key, value] : description.items()) {
        if (!value.is_string()) {
          throw_data("{}: __metadata__ {}: expected a string, found {}", path_, in_quotes(key), value.type_name());
        }
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    const auto dtype = description.is_object() ? description.find("dtype") : description.end();
    const auto shape = description.is_object() ? description.find("shape") : description.end();
    const auto offsets = description.is_object() ? description.find("data_offsets") : description.end();
    if (dtype == description.end() || !dtype->is_string() || shape == description.end() || !shape->is_array() ||
        offsets == description.end() || !offsets->is_array() || offsets->size() != 2) {
      throw_data("{}: tensor {}: expected dtype, shape and two data_offsets", path_, in_quotes(name));
    }
    SafetensorsEntry entry;
    entry.name = name;
    entry.dtype = dtype->get<std::string>();
    constexpr size_t kMaxDims = 8;
    if (shape->size() > kMaxDims) {
      throw_data("{}: tensor {}: expected at most {} dimensions, found {}", path_, in_quotes(name), kMaxDims,
                 shape->size());
    }
    uint64_t num_elements = 1;
    for (const nlohmann::json& item : *shape) {
      const uint64_t size = unsigned_number(item, path_, name);
      if (size > kMaxElements || (size != 0 && num_elements > kMaxElements / size)) {
        throw_data("{}: tensor {}: expected at most 2^48 elements, found shape {}", path_, in_quotes(name),
                   shape->dump());
      }
      num_elements *= size;
      entry.shape.push_back(static_cast<int64_t>(size));
    }
    const uint64_t begin = unsigned_number((*offsets)[0], path_, name);
    const uint64_t end = unsigned_number((*offsets)[1], path_, name);
    if (begin > end || end > data.size()) {
      throw_data(
          "{}: tensor {}: data_offsets [{}, {}] lie outside the {} bytes of data; the file is truncated: fetch it "
          "again",
          path_, in_quotes(name), begin, end, data.size());
    }
    const uint64_t size = element_bytes(entry.dtype);
    if (size != 0 && end - begin != num_elements * size) {
      throw_data("{}: tensor {}: expected {} bytes for {} of shape {}, found {}", path_, in_quotes(name),
                 num_elements * size, entry.dtype, shape_text(entry.shape), end - begin);
    }
    entry.bytes = data.subspan(begin, end - begin);
    entries_.push_back(std::move(entry));
  }

  std::sort(entries_.begin(), entries_.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.bytes.data(), a.bytes.size()) < std::pair(b.bytes.data(), b.bytes.size());
  });
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i > 0 && entries_[i].bytes.data() < entries_[i - 1].bytes.data() + entries_[i - 1].bytes.size()) {
      throw_data("{}: tensors {} and {} overlap", path_, in_quotes(entries_[i - 1].name), in_quotes(entries_[i].name));
    }
    index_.emplace(entries_[i].name, i);
  }
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &entries_[it->second];
}

WeightView SafetensorsFile::weight(std::string_view name) const {
  const SafetensorsEntry* entry = find(name);
  if (entry == nullptr) {
    throw_data("{}: expected tensor {}, found none among the file's {}", path_, in_quotes(name), entries_.size());
  }
  WeightView view;
  view.name = entry->name;
  view.shape = entry->shape;
  view.bytes = entry->bytes;
  if (entry->dtype == "F32") {
    view.type = WeightType::kF32;
  } else if (entry->dtype == "F16") {
    view.type = WeightType::kF16;
  } else if (entry->dtype == "BF16") {
    view.type = WeightType::kBF16;
  } else {
    throw_data("{}: tensor {}: expected dtype F32, F16 or BF16, found {}; convert the checkpoint", path_,
               in_quotes(name), in_quotes(entry->dtype));
  }
  return view;
}

void SafetensorsFile::release_pages(const WeightView& weight) const {
  if (file_) file_->release_pages(static_cast<size_t>(weight.bytes.data() - bytes_.data()), weight.bytes.size());
}

namespace {

// A file that is not there until commit(), and leaves nothing behind when it never comes to that.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(path), temporary_(fmt::format("{}.tmp{}", path, ::getpid())) {
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd_ < 0) throw_data("{}: cannot write: {}", path_, std::strerror(errno));
  }
  ~AtomicFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(temporary_.c_str());
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size_bytes) {
    const auto* bytes = static_cast<const char*>(data);
    while (size_bytes > 0) {
      const ssize_t written = ::write(fd_, bytes, size_bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw_data("{}: cannot write: {}", path_, std::strerror(errno));
      bytes += written;
      size_bytes -= static_cast<size_t>(written);
    }
  }
  void commit() {
    const bool synced = ::fsync(fd_) == 0;
    const bool closed = ::close(std::exchange(fd_, -1)) == 0;
    if (!synced || !closed || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
      throw_data("{}: cannot write: {}", path_, std::strerror(errno));
    }
    committed_ = true;
  }

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
  bool committed_ = false;
};

}  // namespace

void write_safetensors(const std::string& path, std::span<const WeightView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const WeightView& tensor : tensors) {
    const WeightLayout element = layout(tensor.type);
    const int64_t wanted_bytes = tensor.num_elements() * element.block_bytes;
    if (element.block_elements != 1 || static_cast<int64_t>(tensor.bytes.size()) != wanted_bytes) {
      throw_data("{}: tensor {}: expected {} bytes of F32, F16 or BF16 for shape {}, found {} bytes of {}", path,
                 in_quotes(tensor.name), wanted_bytes, shape_text(tensor.shape), tensor.bytes.size(), element.name);
    }
    if (header.contains(tensor.name)) throw_data("{}: tensor {} appears twice", path, in_quotes(tensor.name));
    header[tensor.name] = {
        {"dtype", element.name}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');  // tensors begin 8-byte aligned
  const uint64_t header_bytes = text.size();

  AtomicFile file(path);
  file.write(&header_bytes, 8);
  file.write(text.data(), text.size());
  for (const WeightView& tensor : tensors) file.write(tensor.bytes.data(), tensor.bytes.size());
  file.commit();
}

}  // namespace sparsek
