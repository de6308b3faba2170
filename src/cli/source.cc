#include "cli/source.h"

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "base/error.h"
#include "base/mapped_file.h"
#include "cli/device.h"
#include "cli/resources.h"
#include "data/gguf.h"
#include "data/hf_checkpoint.h"
#include "data/quote.h"

namespace sparsek::cli {

Tokenizer open_tokenizer(const std::string& model_path) {
  if (std::filesystem::is_directory(model_path)) return Tokenizer::from_hf(HfCheckpoint(model_path));
  return Tokenizer::from_gguf(GgufFile(model_path));
}

Tokenizer open_tokenizer_file(const std::string& model) {
  const std::string path = resolve_model(model);
  if (!path.ends_with(".json") || std::filesystem::is_directory(path)) return open_tokenizer(path);
  const MappedFile file(path);
  return Tokenizer::from_json({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, "", path);
}

at::ScalarType parse_dtype(const std::string& text) {
  if (text == "bf16") return at::kBFloat16;
  if (text == "f32") return at::kFloat;
  throw_usage("--dtype: expected bf16 or f32, found {}", in_quotes(text));
}

void set_threads(int64_t threads) {
  static constexpr int64_t kMaxThreads = 1024;
  if (threads < 0 || threads > kMaxThreads) {
    throw_usage("--threads: expected 0 (one a core) to {}, found {}", kMaxThreads, threads);
  }
  const int count = threads == 0 ? omp_get_num_procs() : static_cast<int>(threads);
  omp_set_num_threads(count);
  at::set_num_threads(count);
}

int64_t tokens_at_once(const ModelConfig& config) {
  static constexpr int64_t kDefault = 512, kDefaultOnGpu = 8192, kMost = 65536;
  if (config.chunk_size.has_value()) {
    if (*config.chunk_size < 1 || *config.chunk_size > kMost) {
      throw_usage("--chunk: expected 1 to {} tokens, found {}", kMost, *config.chunk_size);
    }
    return *config.chunk_size;
  }
  const bool is_sparsek = config.attention.kind == model::AttentionKind::kSparsek;
  return is_sparsek && config.device != "cpu" ? kDefaultOnGpu : kDefault;
}

model::AttentionRequest attention_request(const ModelConfig& config) {
  model::AttentionRequest request = config.attention;
  if (config.scorer) {
    request.scorer = *config.scorer;
  } else if (request.kind == model::AttentionKind::kSparsek && !request.slope) {
    if (const std::string adapter = adapter_of(config.model); !adapter.empty()) request.scorer = adapter;
  }
  return request;
}

model::Transformer open_model(const ModelConfig& config, const std::string& model_path,
                              std::optional<int64_t> expected_tokens, int64_t documents) {
  set_threads(config.threads);
  model::Transformer model =
      model::Transformer::load({.path = model_path,
                                .random_weights = config.random_weights,
                                .attention = attention_request(config),
                                .placement = {.dtype = parse_dtype(config.dtype), .device = open_device(config.device)},
                                .chunk_size = tokens_at_once(config),
                                .expected_tokens = expected_tokens,
                                .documents = documents});
  for (const std::string& notice : model.notices()) std::fprintf(stderr, "sparsek: %s\n", notice.c_str());
  return model;
}

std::string reading_on(const model::Transformer& model) {
  return model.device().is_cpu() ? "reading" : "reading on " + model.device().str();
}

FileTokens::FileTokens(const Tokenizer& tokenizer, const std::string& path)
    : reader_(path), encoder_(tokenizer, SpecialTokens::kAsText) {}

void FileTokens::encode_next() {
  ready_.clear();
  next_ = 0;
  const std::string_view text = reader_.next();
  if (text.empty()) {
    encoder_.finish(ready_);
    ended_ = true;
  } else {
    encoder_.push(text, ready_);
  }
}

std::optional<int64_t> FileTokens::expected_total() {
  if (reader_.size_bytes() && reader_.bytes_read() == 0) encode_next();
  const std::optional<int64_t> total = estimated_total();
  return total ? std::optional(*total + *total / 32 + 64) : std::nullopt;
}

void FileTokens::read(int64_t wanted, std::vector<int32_t>& ids) {
  while (wanted > 0) {
    if (next_ == ready_.size()) {
      if (ended_) return;
      encode_next();
      continue;
    }
    const size_t count = std::min(static_cast<size_t>(wanted), ready_.size() - next_);
    ids.insert(ids.end(), ready_.begin() + static_cast<int64_t>(next_),
               ready_.begin() + static_cast<int64_t>(next_ + count));
    next_ += count;
    wanted -= static_cast<int64_t>(count);
    given_ += static_cast<int64_t>(count);
  }
}

std::optional<int64_t> FileTokens::estimated_total() const {
  const auto encoded = static_cast<int64_t>(ready_.size() - next_) + given_;
  if (!reader_.size_bytes() || reader_.bytes_read() == 0) return std::nullopt;
  const double ratio = static_cast<double>(*reader_.size_bytes()) / static_cast<double>(reader_.bytes_read());
  return static_cast<int64_t>(std::min(static_cast<double>(encoded) * ratio, 0x1p60));  // files have holes
}

}  // namespace sparsek::cli
