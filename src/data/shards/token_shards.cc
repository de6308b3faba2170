#include "data/shards/token_shards.h"

#include <cassert>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/sha256.h"
#include "data/json_file.h"
#include "data/quote.h"
#include "data/shards/format.h"

namespace sparsek {
namespace fs = std::filesystem;
using nlohmann::json;

TokenShards::TokenShards(std::string folder) : folder_(std::move(folder)) {
  const std::string path = folder_ + "/" + kManifestName;
  std::error_code error;
  if (!fs::exists(path, error)) {
    if (fs::exists(folder_ + "/progress/job.json", error)) {
      throw_data(
          "{}: expected finished token shards, found those of a run that ended early; run `sparsek tokenize` again",
          folder_);
    }
    throw_data("{}: expected a folder of token shards (`sparsek tokenize`), found no {} in it", folder_, kManifestName);
  }
  const json manifest = read_json_object(path);
  struct Listed {
    std::string file;
    int64_t num_tokens, num_documents, size_bytes;
  };
  std::vector<Listed> listed;
  int64_t num_tokens = 0, num_documents = 0;
  try {
    if (manifest.at("format") != kManifestFormat) {
      throw_data("{}: expected format {}, found {}", path, kManifestFormat, in_quotes(manifest.at("format").dump()));
    }
    const json& job = manifest.at("job");
    tokenizer_ = job.at("tokenizer").at("sha256");
    vocab_size_ = job.at("tokenizer").at("vocab_size");
    num_tokens = manifest.at("tokens");
    num_documents = manifest.at("documents");
    for (const json& shard : manifest.at("shards")) {
      listed.push_back({shard.at("file"), shard.at("tokens"), shard.at("documents"), shard.at("bytes")});
      sha256_.push_back(shard.at("sha256"));
    }
  } catch (const json::exception&) {  // a field that is missing, or of another type
    throw_data("{}: expected the manifest of token shards, found a damaged one", path);
  }

  token_offsets_ = document_offsets_ = {0};
  for (const Listed& wanted : listed) {
    if (wanted.file.find('/') != wanted.file.npos) {
      throw_data("{}: expected names of files in the folder, found {}", path, in_quotes(wanted.file));
    }
    const ShardFile& shard = shards_.emplace_back(folder_ + "/" + wanted.file);
    if (shard.num_tokens() != wanted.num_tokens || shard.num_documents() != wanted.num_documents ||
        shard.size_bytes() != wanted.size_bytes) {
      throw_data("{}: expected {} tokens, {} documents and {} bytes as {} says, found {}, {} and {}", shard.path(),
                 wanted.num_tokens, wanted.num_documents, wanted.size_bytes, kManifestName, shard.num_tokens(),
                 shard.num_documents(), shard.size_bytes());
    }
    if (shard.vocab_size() != vocab_size_ || shard.tokenizer() != tokenizer_) {
      throw_data("{}: expected a shard of tokenizer {}, found one of {}", shard.path(), in_quotes(tokenizer_),
                 in_quotes(shard.tokenizer()));
    }
    token_offsets_.push_back(token_offsets_.back() + shard.num_tokens());
    document_offsets_.push_back(document_offsets_.back() + shard.num_documents());
  }
  if (token_offsets_.back() != num_tokens || document_offsets_.back() != num_documents || num_documents == 0) {
    throw_data("{}: expected shards of {} tokens and {} documents, found {} and {}", path, num_tokens, num_documents,
               token_offsets_.back(), document_offsets_.back());
  }
  next_begins_.resize(shards_.size());
  int64_t next = num_tokens;
  for (size_t s = shards_.size(); s-- > 0;) {
    next_begins_[s] = next;
    if (shards_[s].num_documents() > 0) next = token_offsets_[s] + shards_[s].document_begin(0);
  }
  if (next != 0) throw_data("{}: expected the first document to begin at token 0, found {}", folder_, next);
}

TokenShards::Document TokenShards::document_in(size_t shard, int64_t local) const {
  const ShardFile& file = shards_[shard];
  const int64_t offset = token_offsets_[shard];
  const bool is_last = local + 1 == file.num_documents();
  return {offset + file.document_begin(local), is_last ? next_begins_[shard] : offset + file.document_begin(local + 1),
          file.document_key(local)};
}

TokenShards::Document TokenShards::document(int64_t i) const {
  assert(i >= 0 && i < num_documents());
  const size_t shard = shard_of_document(i);
  return document_in(shard, i - document_offsets_[shard]);
}

void TokenShards::read(int64_t begin, std::span<TokenId> out) const {
  assert(begin >= 0 && begin + static_cast<int64_t>(out.size()) <= num_tokens());
  size_t shard = static_cast<size_t>(std::upper_bound(token_offsets_.begin(), token_offsets_.end(), begin) -
                                     token_offsets_.begin()) -
                 1;
  while (!out.empty()) {
    const auto count = std::min<int64_t>(static_cast<int64_t>(out.size()), token_offsets_[shard + 1] - begin);
    shards_[shard].read(begin - token_offsets_[shard], out.first(static_cast<size_t>(count)));
    out = out.subspan(static_cast<size_t>(count));
    begin += count;
    ++shard;
  }
}

std::string TokenShards::fingerprint() const {
  Sha256 hash;
  for (const std::string& shard : sha256_) hash.update(shard);
  return hash.hex();
}

void TokenShards::check_tokenizer(const Tokenizer& tokenizer, std::string_view name) const {
  if (tokenizer.fingerprint() == tokenizer_) return;
  throw_data(
      "{}: expected shards of the tokenizer of {} (vocabulary {}, sha256 {}), found those of another (vocabulary {}, "
      "sha256 {}); make them with `sparsek tokenize --model` of that model",
      folder_, name, tokenizer.vocab_size(), tokenizer.fingerprint(), vocab_size_, tokenizer_);
}

void TokenShards::verify(const std::function<bool(int64_t)>& go_on) const {
  int64_t size_bytes = 0;
  for (size_t s = 0; s < shards_.size(); ++s) {
    const std::string found = shards_[s].sha256();
    if (found != sha256_[s]) {
      throw_data("{}: expected sha256 {} as {} says, found {}; it is damaged", shards_[s].path(), sha256_[s],
                 kManifestName, found);
    }
    size_bytes += shards_[s].size_bytes();
    if (!go_on(size_bytes)) return;
  }
}

}  // namespace sparsek
