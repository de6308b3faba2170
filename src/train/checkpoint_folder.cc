#include "train/checkpoint_folder.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <iterator>
#include <optional>

#include "base/atomic_file.h"
#include "base/sha256.h"
#include "data/quote.h"
#include "data/text_reader.h"

namespace sparsek::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPrefix = "step-";
constexpr const char* kUnfinished = ".part";   // being written
constexpr const char* kBeingRemoved = ".old";  // moved out of the way first, so that what has a name is whole
constexpr const char* kFormat = "sparsek-checkpoint-1";

std::string sha256_of(const std::string& text) {
  Sha256 hash;
  hash.update(text);
  return hash.hex();
}

// Failing to clean up is no error of the run.
void remove_folder(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path + kBeingRemoved, ignored);
  fs::rename(path, path + kBeingRemoved, ignored);
  fs::remove_all(ignored ? path : path + kBeingRemoved, ignored);
}

// The step of a folder's name, when it is a checkpoint's.
std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const char *begin = name.data() + std::string_view(kPrefix).size(), *end = name.data() + name.size();
  int64_t step = 0;
  const auto [rest, error] = std::from_chars(begin, end, step);
  if (error != std::errc() || rest != end) return std::nullopt;
  return step;
}

// step-00001000.part or .old.
bool is_left_over(const fs::path& path) {
  const bool has_suffix = path.extension() == kUnfinished || path.extension() == kBeingRemoved;
  return has_suffix && step_of(path.stem().string()).has_value();
}

Checkpoint read_checkpoint(const std::string& path) {
  const std::string state_path = path + "/state.json";
  Checkpoint checkpoint;
  checkpoint.path = path;
  std::string tensors_sha256;
  try {
    const nlohmann::json outer = nlohmann::json::parse(read_text(state_path));
    const std::string wanted = outer.at("sha256").get<std::string>(), text = outer.at("content").get<std::string>();
    if (const std::string found = sha256_of(text); found != wanted) {
      throw_data("{}: expected SHA-256 {} of its content, found {}; the file is damaged", state_path, wanted, found);
    }
    const nlohmann::json whole = nlohmann::json::parse(text);
    if (whole.at("format") != kFormat) {
      throw_data("{}: expected format {}, found {}", state_path, kFormat, in_quotes(whole.at("format").dump()));
    }
    tensors_sha256 = whole.at("tensors_sha256").get<std::string>();
    checkpoint.state = whole.at("state");
  } catch (const nlohmann::json::exception&) {
    throw_data("{}: expected a checkpoint's state, found something else; the file is damaged", state_path);
  }
  checkpoint.tensors = read_tensors(path + "/tensors.safetensors", tensors_sha256);
  return checkpoint;
}

}  // namespace

std::string CheckpointFolder::path_of(int64_t step) const {
  return fmt::format("{}/{}{:08}", path_, kPrefix, step);
}

std::vector<int64_t> CheckpointFolder::steps() const {
  std::vector<int64_t> steps;
  std::error_code missing;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_, missing)) {
    if (const std::optional<int64_t> step = step_of(entry.path().filename().string())) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

void CheckpointFolder::save(int64_t step, const nlohmann::json& state, const NamedTensors& tensors, int64_t keep) {
  const std::string final_path = path_of(step), part = final_path + kUnfinished;
  std::vector<int64_t> saved = steps();
  std::error_code error;
  fs::remove_all(part, error);
  fs::create_directories(part, error);
  if (error) throw WriteError(fmt::format("{}: cannot create it: {}", part, error.message()));
  try {
    nlohmann::json whole;
    whole["format"] = kFormat;
    whole["state"] = state;
    whole["tensors_sha256"] = write_tensors(part + "/tensors.safetensors", tensors, {{"format", kFormat}});
    const std::string text = whole.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
    write_file_atomically(part + "/state.json", nlohmann::json{{"sha256", sha256_of(text)}, {"content", text}}.dump());
    sync_folder(part);
    // Of a run that was given up for an older checkpoint. Before this one has its name: a kill in between leaves what
    // this run began with as the newest.
    for (; !saved.empty() && saved.back() >= step; saved.pop_back()) remove_folder(path_of(saved.back()));
    fs::rename(part, final_path, error);
    if (error) throw WriteError(fmt::format("{}: cannot rename it: {}", part, error.message()));
    sync_folder(path_);
  } catch (...) {
    fs::remove_all(part, error);
    throw;
  }
  const int64_t too_many = static_cast<int64_t>(saved.size()) + 1 - keep;
  for (int64_t i = 0; i < too_many; ++i) remove_folder(path_of(saved[i]));
}

void CheckpointFolder::remove_unfinished() const {
  std::vector<fs::path> found;
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_, ignored)) {
    if (is_left_over(entry.path())) found.push_back(entry.path());
  }
  for (const fs::path& path : found) fs::remove_all(path, ignored);
}

Checkpoint load_checkpoint(const std::string& path) {
  fs::path folder = path;
  if (!folder.has_filename()) folder = folder.parent_path();  // step-00001000/
  try {
    if (is_left_over(folder)) throw_data("{}: expected a whole checkpoint, found one half written or removed", path);
    return read_checkpoint(path);
  } catch (const DataError& error) {
    const std::optional<int64_t> step = step_of(folder.stem().string());
    const CheckpointFolder checkpoints(folder.has_parent_path() ? folder.parent_path().string() : ".");
    const std::vector<int64_t> all = checkpoints.steps();
    const auto it = std::lower_bound(all.begin(), all.end(), step.value_or(0));
    if (it == all.begin()) throw;
    throw_data("{}; go on from the checkpoint before it with --checkpoint {}", error.what(),
               checkpoints.path_of(*std::prev(it)));
  }
}

Checkpoint CheckpointFolder::load(int64_t step) const {
  return load_checkpoint(path_of(step));
}

}  // namespace sparsek::train
