// The tokenizer that a Hugging Face tokenizer.json describes. Its parts are recognised by structure; a part that this
// program does not compute the same way is refused by name, never ignored.
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/mapped_file.h"
#include "data/hf_checkpoint.h"
#include "data/json_file.h"
#include "data/quote.h"
#include "data/tokenizer_tables.h"

namespace sparsek {
namespace {

using Json = nlohmann::json;

// The member of an object, null when it is absent.
const Json& member(const Json& object, const char* key) {
  static const Json null;
  if (!object.is_object()) return null;
  const auto it = object.find(key);
  return it == object.end() ? null : *it;
}

std::string text_of(const Json& json) {
  return json.is_string() ? json.get<std::string>() : std::string();
}
bool is_true(const Json& object, const char* key) {
  return member(object, key) == Json(true);
}
std::string type_of(const Json& object) {
  return text_of(member(object, "type"));
}

class Reader {
 public:
  Reader(const Json& root, const Json& config, std::string name) : root_(root), config_(config) {
    description_.name = std::move(name);
  }

  TokenizerDescription read() {
    read_normaliser(member(root_, "normalizer"));
    read_pretokenizer(member(root_, "pre_tokenizer"));
    check_decoder(member(root_, "decoder"));
    read_model(member(root_, "model"));
    read_added_tokens(member(root_, "added_tokens"));
    read_post_processor(member(root_, "post_processor"));
    read_config();
    return std::move(description_);
  }

 private:
  [[noreturn]] void refuse(std::string_view part, std::string_view wanted, std::string_view found) const {
    throw_data("{}: {}: expected {}, found {}", description_.name, part, wanted, in_quotes(found));
  }

  TokenId token_id(const Json& json, std::string_view part) const {
    if (!json.is_number_unsigned() || json.get<uint64_t>() > INT32_MAX) refuse(part, "a token id", json.dump());
    return json.get<TokenId>();
  }

  void read_normaliser(const Json& json) {
    if (json.is_null()) return;
    const Json& parts = type_of(json) == "Sequence" ? member(json, "normalizers") : json;
    for (const Json& part : parts.is_array() ? parts : Json::array({parts})) {
      if (type_of(part) != "NFC") refuse("normalizer", "none or NFC", type_of(part));
      description_.has_nfc = true;
    }
  }

  void read_pretokenizer(const Json& json) {
    constexpr const char* kWanted = "the pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen 2";
    Json parts = type_of(json) == "Sequence" ? member(json, "pretokenizers") : Json::array({json});
    if (!parts.is_array() || parts.empty() || parts.size() > 2 || type_of(parts.back()) != "ByteLevel") {
      refuse("pre_tokenizer", kWanted, json.dump());
    }
    const Json& byte_level = parts.back();
    if (is_true(byte_level, "add_prefix_space")) refuse("pre_tokenizer", "add_prefix_space false", "true");
    const Json& use_regex = member(byte_level, "use_regex");
    const bool has_gpt2_regex = use_regex.is_null() || use_regex == Json(true);
    if (parts.size() == 1 && has_gpt2_regex) {
      description_.pretokenizer = PretokenizerKind::kGpt2;
      return;
    }
    const Json& first = parts.front();
    if (parts.size() == 2 && has_gpt2_regex && type_of(first) == "Digits" && is_true(first, "individual_digits")) {
      description_.pretokenizer = PretokenizerKind::kSmolLm;
      return;
    }
    if (parts.size() == 2 && !has_gpt2_regex && type_of(first) == "Split" &&
        text_of(member(first, "behavior")) == "Isolated" && !is_true(first, "invert")) {
      const auto kind = pretokenizer_from_pattern(text_of(member(member(first, "pattern"), "Regex")));
      if (kind) {
        description_.pretokenizer = *kind;
        return;
      }
    }
    refuse("pre_tokenizer", kWanted, json.dump());
  }

  void check_decoder(const Json& json) const {
    if (!json.is_null() && type_of(json) != "ByteLevel") refuse("decoder", "ByteLevel", type_of(json));
  }

  void read_model(const Json& model) {
    // Early files leave the type out.
    const std::string type = type_of(model);
    if (!model.is_object() || (type != "BPE" && !member(model, "type").is_null())) {
      refuse("model", "byte-level BPE", model.is_object() ? type : model.type_name());
    }
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!text_of(member(model, key)).empty())
        refuse(std::string("model.") + key, "none", text_of(member(model, key)));
    }
    const Json& dropout = member(model, "dropout");
    if (!dropout.is_null() && dropout != Json(0.0)) refuse("model.dropout", "none", dropout.dump());
    if (is_true(model, "byte_fallback")) refuse("model.byte_fallback", "false", "true");
    description_.ignore_merges = is_true(model, "ignore_merges");
    description_.fuse_unknown = is_true(model, "fuse_unk");

    const Json& vocab = member(model, "vocab");
    if (!vocab.is_object() || vocab.empty()) refuse("model.vocab", "an object of tokens and ids", vocab.type_name());
    const Json& added = member(root_, "added_tokens");
    // Ids may leave gaps, but not so wide that a table by id is mostly holes.
    max_tokens_ = 2 * (vocab.size() + (added.is_array() ? added.size() : 0)) + 65536;
    for (const auto& [text, id] : vocab.get_ref<const Json::object_t&>())
      add(id, text, TokenKind::kNormal, "model.vocab");
    if (const std::string unknown = text_of(member(model, "unk_token")); !unknown.empty()) {
      const Json& id = member(vocab, unknown.c_str());
      if (id.is_null()) refuse("model.unk_token", "a token of the vocabulary", unknown);
      description_.unknown = token_id(id, "model.unk_token");
    }

    const Json& merges = member(model, "merges");
    if (!merges.is_array()) refuse("model.merges", "a list", merges.type_name());
    description_.merges.reserve(merges.size());
    for (const Json& merge : merges) {
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        description_.merges.emplace_back(merge[0].get_ref<const std::string&>(),
                                         merge[1].get_ref<const std::string&>());
        continue;
      }
      const std::string_view text = merge.is_string() ? merge.get_ref<const std::string&>() : std::string_view();
      const size_t space = text.find(' ');
      if (space == text.npos || space == 0 || space + 1 == text.size() || text.find(' ', space + 1) != text.npos) {
        refuse("model.merges", "pairs of tokens", merge.dump());
      }
      description_.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    }
  }

  void add(const Json& id_json, std::string_view text, TokenKind kind, std::string_view part) {
    const TokenId id = token_id(id_json, part);
    const auto i = static_cast<size_t>(id);
    if (i >= max_tokens_) refuse(part, fmt::format("ids below {}", max_tokens_), id_json.dump());
    auto& tokens = description_.tokens;
    if (i >= tokens.size()) tokens.resize(i + 1);
    // An added token may also stand in the vocabulary, under the same id.
    if (tokens[i].kind != TokenKind::kAbsent && tokens[i].text != text) {
      throw_data("{}: {}: expected one token for id {}, found {} and {}", description_.name, part, id,
                 in_quotes(tokens[i].text), in_quotes(text));
    }
    tokens[i] = {text, kind};
  }

  void read_added_tokens(const Json& json) {
    if (json.is_null()) return;
    if (!json.is_array()) refuse("added_tokens", "a list", json.type_name());
    for (const Json& token : json) {
      const Json& content = member(token, "content");
      if (!content.is_string() || content.get_ref<const std::string&>().empty()) {
        refuse("added_tokens", "a text for each", content.dump());
      }
      const auto& text = content.get_ref<const std::string&>();
      for (const char* key : {"single_word", "lstrip", "rstrip"}) {
        if (is_true(token, key)) refuse(fmt::format("added_tokens: {} of {}", key, in_quotes(text)), "false", "true");
      }
      add(member(token, "id"), text, is_true(token, "special") ? TokenKind::kControl : TokenKind::kAdded,
          "added_tokens");
    }
  }

  // Templates say which tokens stand around a text.
  void read_post_processor(const Json& json) {
    const std::string type = type_of(json);
    if (json.is_null() || type == "ByteLevel") return;
    if (type == "Sequence") {
      for (const Json& part : member(json, "processors")) read_post_processor(part);
      return;
    }
    if (type != "TemplateProcessing") refuse("post_processor", "ByteLevel or TemplateProcessing", type);
    const Json& single = member(json, "single");
    const Json& first = single.is_array() && !single.empty() ? single[0] : Json();
    const std::string bos = text_of(member(member(first, "SpecialToken"), "id"));
    const size_t wanted_size = bos.empty() ? 1 : 2;
    if (!single.is_array() || single.size() != wanted_size || !single.back().contains("Sequence")) {
      refuse("post_processor", "a template of at most one token and the text after it", single.dump());
    }
    if (bos.empty()) return;
    description_.add_bos = true;
    description_.bos = find_fixed(bos, "post_processor");
  }

  TokenId find_fixed(std::string_view text, std::string_view part) const {
    for (size_t i = 0; i < description_.tokens.size(); ++i) {
      const auto& token = description_.tokens[i];
      if (token.kind != TokenKind::kAbsent && token.text == text) return static_cast<TokenId>(i);
    }
    refuse(part, "a token of the vocabulary", text);
  }

  // tokenizer_config.json: tokens are texts, or objects with the text as content.
  void read_config() {
    const auto config_token = [&](const char* key) -> std::optional<TokenId> {
      const Json& json = member(config_, key);
      const std::string text = text_of(json.is_object() ? member(json, "content") : json);
      if (text.empty()) return std::nullopt;
      return find_fixed(text, std::string("tokenizer_config.json: ") + key);
    };
    if (const auto bos = config_token("bos_token"); bos && !description_.bos) description_.bos = bos;
    if (const auto eos = config_token("eos_token")) description_.end_ids.push_back(*eos);
    if (const Json& add_bos = member(config_, "add_bos_token"); add_bos.is_boolean()) {
      description_.add_bos = add_bos.get<bool>();
    }
    if (const Json& text = member(config_, "chat_template"); text.is_string()) {
      description_.chat_template = text.get<std::string>();
    }
  }

  const Json& root_;
  const Json& config_;
  size_t max_tokens_ = 0;
  TokenizerDescription description_;
};

}  // namespace

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, std::string_view tokenizer_config, std::string name) {
  const Json root = parse_json(tokenizer_json, name);
  const Json config = tokenizer_config.empty() ? Json::object() : parse_json(tokenizer_config, name + " (config)");
  return Tokenizer(std::make_unique<const TokenizerTables>(Reader(root, config, std::move(name)).read()));
}

Tokenizer Tokenizer::from_hf(const HfCheckpoint& checkpoint) {
  const std::string path = checkpoint.file("tokenizer.json");
  const Json root = read_json_object(path);
  TokenizerDescription description = Reader(root, checkpoint.tokenizer_config(), path).read();
  const std::vector<int64_t> ends = checkpoint.eos_token_ids();
  for (const int64_t id : ends) description.end_ids.push_back(static_cast<TokenId>(id));
  description.chat_template = checkpoint.chat_template();
  return Tokenizer(std::make_unique<const TokenizerTables>(description));
}

}  // namespace sparsek
