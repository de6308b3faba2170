// Tensors of any element type in a safetensors file, with the hash of the file.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace sparsek::train {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// Writes `path` whole or not at all, and returns its SHA-256. Throws WriteError.
std::string write_tensors(const std::string& path, const NamedTensors& tensors,
                          const std::map<std::string, std::string>& metadata);

// All tensors of a file, on the CPU. Throws DataError naming the file when it is damaged or its SHA-256 is not
// `sha256` (empty: any).
std::map<std::string, at::Tensor> read_tensors(const std::string& path, const std::string& sha256);

}  // namespace sparsek::train
