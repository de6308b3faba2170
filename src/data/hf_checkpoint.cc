#include "data/hf_checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/mapped_file.h"
#include "data/json_file.h"
#include "data/quote.h"

namespace sparsek {
namespace {

bool exists(const std::string& path) {
  struct stat info{};
  return ::stat(path.c_str(), &info) == 0;
}

std::unique_ptr<nlohmann::json> read_optional(const std::string& path) {
  return std::make_unique<nlohmann::json>(exists(path) ? read_json_object(path) : nlohmann::json::object());
}

}  // namespace

HfCheckpoint::~HfCheckpoint() = default;
HfCheckpoint::HfCheckpoint(HfCheckpoint&&) noexcept = default;
HfCheckpoint& HfCheckpoint::operator=(HfCheckpoint&&) noexcept = default;

std::string HfCheckpoint::file(std::string_view name) const {
  return fmt::format("{}/{}", folder_, name);
}

HfCheckpoint::HfCheckpoint(std::string folder) : folder_(std::move(folder)) {
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  struct stat info{};
  if (::stat(folder_.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    throw_data("{}: expected a folder with config.json and model.safetensors, found {}", folder_,
               exists(folder_) ? "a file" : "nothing");
  }
  config_ = std::make_unique<nlohmann::json>(read_json_object(file("config.json")));
  tokenizer_config_ = read_optional(file("tokenizer_config.json"));
  generation_config_ = read_optional(file("generation_config.json"));

  if (exists(file("model.safetensors"))) {
    shards_.emplace_back(file("model.safetensors"));
    for (const SafetensorsEntry& entry : shards_.front().entries()) shard_index_.emplace(entry.name, 0);
    return;
  }
  const std::string index_path = file("model.safetensors.index.json");
  if (!exists(index_path)) {
    throw_data(
        "{}: expected model.safetensors or model.safetensors.index.json, found neither; convert the checkpoint to "
        "safetensors",
        folder_);
  }
  const nlohmann::json index = read_json_object(index_path);
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    throw_data("{}: expected weight_map, an object of tensor names and files", index_path);
  }
  std::unordered_map<std::string, size_t> opened;
  for (const auto& [tensor, shard] : map->items()) {
    const std::string name = shard.is_string() ? shard.get<std::string>() : std::string();
    // A plain name only: an index must not reach files outside its folder.
    if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string_view("/\\\0", 3)) != name.npos) {
      throw_data("{}: weight_map {}: expected the name of a file in this folder, found {}", index_path,
                 in_quotes(tensor), in_quotes(shard.is_string() ? name : shard.type_name()));
    }
    const auto [it, is_new] = opened.emplace(name, shards_.size());
    if (is_new) shards_.emplace_back(file(name));
    if (shards_[it->second].find(tensor) == nullptr) {
      throw_data("{}: expected tensor {}, which {} places here, found none", file(name), in_quotes(tensor), index_path);
    }
    shard_index_.emplace(tensor, it->second);
  }
}

std::optional<std::string> HfCheckpoint::chat_template() const {
  if (const std::string path = file("chat_template.jinja"); exists(path)) {
    const MappedFile text(path);
    return std::string(reinterpret_cast<const char*>(text.bytes().data()), text.bytes().size());
  }
  const auto found = tokenizer_config_->find("chat_template");
  if (found == tokenizer_config_->end() || found->is_null()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  if (found->is_array()) {  // several templates by name
    for (const nlohmann::json& entry : *found) {
      if (!entry.is_object() || entry.value("name", nlohmann::json()) != "default") continue;
      const auto text = entry.find("template");
      if (text != entry.end() && text->is_string()) return text->get<std::string>();
    }
  }
  throw_data("{}: chat_template: expected a text, or a list with one named 'default', found {}",
             file("tokenizer_config.json"), found->type_name());
}

std::vector<int64_t> HfCheckpoint::eos_token_ids() const {
  for (const auto& [json, name] :
       {std::pair(generation_config_.get(), "generation_config.json"), std::pair(config_.get(), "config.json")}) {
    const auto found = json->find("eos_token_id");
    if (found == json->end() || found->is_null()) continue;
    const nlohmann::json list = found->is_array() ? *found : nlohmann::json::array({*found});
    std::vector<int64_t> ids;
    for (const nlohmann::json& id : list) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
        throw_data("{}: eos_token_id: expected a token id or a list of them, found {}", file(name),
                   in_quotes(found->dump()));
      }
      ids.push_back(id.get<int64_t>());
    }
    return ids;
  }
  return {};
}

std::vector<std::string> HfCheckpoint::tensor_names() const {
  std::vector<std::string> names;
  names.reserve(shard_index_.size());
  for (const auto& [name, shard] : shard_index_) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

const SafetensorsFile* HfCheckpoint::shard_of(std::string_view name) const {
  const auto it = shard_index_.find(std::string(name));
  return it == shard_index_.end() ? nullptr : &shards_[it->second];
}

bool HfCheckpoint::contains(std::string_view name) const {
  return shard_of(name) != nullptr;
}

WeightView HfCheckpoint::weight(std::string_view name) const {
  if (const SafetensorsFile* shard = shard_of(name)) return shard->weight(name);
  throw_data("{}: expected tensor {}, found none among the checkpoint's {}", folder_, in_quotes(name),
             shard_index_.size());
}

void HfCheckpoint::release_pages(const WeightView& weight) const {
  if (const SafetensorsFile* shard = shard_of(weight.name)) shard->release_pages(weight);
}

}  // namespace sparsek
