// Checkpoints of a run: FOLDER/step-00001000/{tensors.safetensors, state.json}. A checkpoint appears under its name
// when both files are on the disk, so that what is there is whole; older ones go only after that.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/tensor_file.h"

namespace sparsek::train {

struct Checkpoint {
  std::string path;  // its folder
  nlohmann::json state;
  std::map<std::string, at::Tensor> tensors;
};

class CheckpointFolder {
 public:
  explicit CheckpointFolder(std::string path) : path_(std::move(path)) {}

  std::vector<int64_t> steps() const;  // ascending
  std::string path_of(int64_t step) const;

  // Throws WriteError when the disk is full; what was saved before stays. Then keeps the newest `keep`, and none of a
  // later step: those are of a run that was given up for an older checkpoint.
  void save(int64_t step, const nlohmann::json& state, const NamedTensors& tensors, int64_t keep);
  Checkpoint load(int64_t step) const;  // as load_checkpoint
  // What a run that was killed while it saved or cleaned up left behind. Nobody else may be saving here.
  void remove_unfinished() const;

 private:
  std::string path_;
};

// One checkpoint by its folder. Throws DataError naming the damaged file, its hash and the checkpoint before it.
Checkpoint load_checkpoint(const std::string& path);

}  // namespace sparsek::train
