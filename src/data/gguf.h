// GGUF version 3 files: typed metadata and tensor views over a mapped file.
//
// Opening checks every count, size and offset against the file before use, so a damaged or hostile file ends in a
// DataError and never in an allocation of a size that the file merely claims. Not done here: writing, big-endian
// files, nested metadata arrays.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/mapped_file.h"
#include "data/weight_view.h"

namespace sparsek {

class GgufFile {
 public:
  // Maps and checks `path`. Throws DataError naming the file, what was wanted and what was found.
  explicit GgufFile(const std::string& path);
  // The same over bytes that the caller keeps alive; `name` stands for the file in messages.
  static GgufFile from_bytes(std::span<const uint8_t> bytes, std::string name);

  const std::string& path() const { return path_; }

  // Metadata. find_*: nothing when the key is absent. get_*: DataError naming the key when it is absent. Both throw
  // when the value has another type; integers of any width are accepted where their value fits.
  bool contains(std::string_view key) const;
  std::optional<int64_t> find_int(std::string_view key) const;
  std::optional<double> find_float(std::string_view key) const;  // accepts integers too
  std::optional<bool> find_bool(std::string_view key) const;
  std::optional<std::string_view> find_string(std::string_view key) const;
  std::optional<std::vector<std::string_view>> find_strings(std::string_view key) const;
  std::optional<std::vector<int64_t>> find_ints(std::string_view key) const;
  std::optional<std::vector<float>> find_floats(std::string_view key) const;
  int64_t get_int(std::string_view key) const;
  double get_float(std::string_view key) const;
  bool get_bool(std::string_view key) const;
  std::string_view get_string(std::string_view key) const;
  std::vector<std::string_view> get_strings(std::string_view key) const;
  std::vector<int64_t> get_ints(std::string_view key) const;
  std::vector<float> get_floats(std::string_view key) const;
  std::vector<std::string_view> keys() const;  // in the file's order

  // Tensors, in the file's order.
  const std::vector<WeightView>& tensors() const { return tensors_; }
  const WeightView* find_tensor(std::string_view name) const;  // nullptr when absent
  const WeightView& tensor(std::string_view name) const;       // DataError naming the tensor when absent

  // Gives a tensor's pages back to the kernel, after its bytes were copied elsewhere.
  void release_pages(const WeightView& tensor) const;

 private:
  struct Value {
    uint32_t type = 0;          // GGUF value type
    uint32_t element_type = 0;  // of an array
    uint64_t count = 0;         // of an array
    uint64_t offset = 0;        // of the first value byte in the file
  };
  GgufFile() = default;
  void parse();
  const Value* find(std::string_view key) const;
  std::string_view string_at(uint64_t offset) const;
  void check_array(std::string_view key, const Value& value, std::string_view wanted) const;
  [[noreturn]] void throw_missing(std::string_view key) const;
  [[noreturn]] void throw_wrong_type(std::string_view key, const Value& value, std::string_view wanted) const;

  std::string path_;
  std::optional<MappedFile> file_;
  std::span<const uint8_t> bytes_;
  std::vector<std::string_view> keys_;
  std::unordered_map<std::string_view, Value> values_;
  std::vector<WeightView> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;  // keys point into the file
};

}  // namespace sparsek
