// safetensors files: a bounded JSON header and tensor views over a mapped file, and a writer for small files.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/mapped_file.h"
#include "data/weight_view.h"

namespace sparsek {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as the file says it: "F32", "BF16", "I64" ...
  std::vector<int64_t> shape;
  std::span<const uint8_t> bytes;
};

class SafetensorsFile {
 public:
  // Maps and checks `path`. Throws DataError naming the file, what was wanted and what was found.
  explicit SafetensorsFile(const std::string& path);
  // The same over bytes that the caller keeps alive; `name` stands for the file in messages.
  static SafetensorsFile from_bytes(std::span<const uint8_t> bytes, std::string name);

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // in the order of their bytes
  const SafetensorsEntry* find(std::string_view name) const;                 // nullptr when absent

  // A tensor as a weight: F32, F16 or BF16. DataError naming tensor and dtype when it is another or absent.
  WeightView weight(std::string_view name) const;
  void release_pages(const WeightView& weight) const;

 private:
  SafetensorsFile() = default;
  void parse();

  std::string path_;
  std::optional<MappedFile> file_;
  std::span<const uint8_t> bytes_;
  std::map<std::string, std::string> metadata_;
  std::vector<SafetensorsEntry> entries_;
  std::unordered_map<std::string, size_t> index_;
};

// Writes F32, F16 or BF16 tensors. The file appears under `path` only when complete (temporary file, then rename).
void write_safetensors(const std::string& path, std::span<const WeightView> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace sparsek
