// A Hugging Face checkpoint folder: config.json, model.safetensors or model.safetensors.index.json with its shards,
// tokenizer.json, and the optional tokenizer_config.json, generation_config.json and chat_template.jinja.
#pragma once
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/safetensors.h"
#include "data/weight_view.h"

namespace sparsek {

class HfCheckpoint {
 public:
  // Opens and checks the folder. Throws DataError naming the file, what was wanted and what was found.
  explicit HfCheckpoint(std::string folder);
  ~HfCheckpoint();
  HfCheckpoint(HfCheckpoint&&) noexcept;
  HfCheckpoint& operator=(HfCheckpoint&&) noexcept;

  const std::string& path() const { return folder_; }
  std::string file(std::string_view name) const;  // path of a file in the folder, for messages and opening

  const nlohmann::json& config() const { return *config_; }                      // an object
  const nlohmann::json& tokenizer_config() const { return *tokenizer_config_; }  // an object; {} when there is no file
  std::optional<std::string> chat_template() const;  // from chat_template.jinja or tokenizer_config.json
  // Ids that end a generated text: generation_config.json's, else config.json's; may be empty.
  std::vector<int64_t> eos_token_ids() const;

  // Tensors of all shards.
  std::vector<std::string> tensor_names() const;
  bool contains(std::string_view name) const;
  WeightView weight(std::string_view name) const;  // F32, F16 or BF16; DataError naming the tensor otherwise
  void release_pages(const WeightView& weight) const;

 private:
  const SafetensorsFile* shard_of(std::string_view name) const;

  std::string folder_;
  std::unique_ptr<nlohmann::json> config_;
  std::unique_ptr<nlohmann::json> tokenizer_config_;
  std::unique_ptr<nlohmann::json> generation_config_;
  std::vector<SafetensorsFile> shards_;
  std::unordered_map<std::string, size_t> shard_index_;  // tensor name -> shard
};

}  // namespace sparsek
