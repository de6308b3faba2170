#include "data/tokenizer_files.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "data/byte_alphabet.h"
#include "data/tokenizer_tables.h"

namespace sparsek {
namespace {

using Json = nlohmann::ordered_json;

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json pre_tokenizer(PretokenizerKind kind) {
  if (kind == PretokenizerKind::kGpt2) return byte_level(true);
  Json first = {{"type", "Digits"}, {"individual_digits", true}};
  if (kind != PretokenizerKind::kSmolLm) {
    first = {
        {"type", "Split"}, {"pattern", {{"Regex", split_pattern(kind)}}}, {"behavior", "Isolated"}, {"invert", false}};
  }
  return {{"type", "Sequence"}, {"pretokenizers", Json::array({first, byte_level(kind == PretokenizerKind::kSmolLm)})}};
}

// Puts BOS before a text, and before each of two.
Json bos_template(const std::string& bos, TokenId id) {
  const auto token = [&](int type) { return Json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}}; };
  const auto text = [](const char* name, int type) { return Json{{"Sequence", {{"id", name}, {"type_id", type}}}}; };
  return {{"type", "TemplateProcessing"},
          {"single", Json::array({token(0), text("A", 0)})},
          {"pair", Json::array({token(0), text("A", 0), token(1), text("B", 1)})},
          {"special_tokens", {{bos, {{"id", bos}, {"ids", {id}}, {"tokens", {bos}}}}}}};
}

Json bpe_model(const TokenizerTables& tables) {
  const ByteAlphabet alphabet;
  const auto num_tokens = static_cast<TokenId>(tables.offsets.size()) - 1;
  std::vector<std::string> texts(static_cast<size_t>(num_tokens));  // by id, as the vocabulary spells them
  for (TokenId id = 0; id < num_tokens; ++id) {
    for (const char byte : tables.token_bytes(id))
      texts[static_cast<size_t>(id)] += alphabet.text(static_cast<uint8_t>(byte));
  }
  for (const TokenizerTables::FixedToken& token : tables.fixed) texts[static_cast<size_t>(token.id)] = token.text;
  Json vocab = Json::object(), merges = Json::array();
  std::unordered_set<std::string_view> seen;  // ordered_json would search all it has
  auto& entries = vocab.get_ref<Json::object_t&>();
  for (TokenId id = 0; id < num_tokens; ++id) {
    const std::string& text = texts[static_cast<size_t>(id)];
    if (!text.empty() && seen.insert(text).second) entries.emplace_back(text, id);
  }
  const auto text_of = [&](TokenId id) { return texts[static_cast<size_t>(id)]; };
  for (const Bpe::Merge& merge : tables.bpe.merges())
    merges.push_back(text_of(merge.left) + " " + text_of(merge.right));
  const auto unknown = tables.bpe.unknown();
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", unknown ? Json(text_of(*unknown)) : Json()},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", tables.bpe.fuse_unknown()},
          {"byte_fallback", false},
          {"ignore_merges", !tables.whole_pieces.empty()},
          {"vocab", std::move(vocab)},
          {"merges", std::move(merges)}};
}

std::string dumped(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

TokenizerFiles huggingface_files(const Tokenizer& tokenizer) {
  const TokenizerTables& tables = tokenizer.tables();
  std::vector<TokenizerTables::FixedToken> fixed = tables.fixed;
  std::sort(fixed.begin(), fixed.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  Json added = Json::array();
  for (const TokenizerTables::FixedToken& token : fixed) {
    added.push_back({{"id", token.id},
                     {"content", token.text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", token.is_control}});
  }
  const auto text_of = [&](TokenId id) { return std::string(tables.token_bytes(id)); };
  const bool has_prefix = !tokenizer.prefix().empty();
  const Json root = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", tables.has_nfc ? Json{{"type", "NFC"}} : Json()},
      {"pre_tokenizer", pre_tokenizer(tables.pretokenizer.kind())},
      {"post_processor", has_prefix ? bos_template(text_of(*tables.bos), *tables.bos) : byte_level(true)},
      {"decoder", byte_level(true)},
      {"model", bpe_model(tables)}};

  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_bos_token", has_prefix},
                 {"clean_up_tokenization_spaces", false}};
  Json generation = Json::object();
  if (tables.bos) {
    config["bos_token"] = text_of(*tables.bos);
    generation["bos_token_id"] = *tables.bos;
  }
  if (!tables.end_ids.empty()) {
    config["eos_token"] = text_of(tables.end_ids.front());
    generation["eos_token_id"] = tables.end_ids;
  }
  if (tables.chat_template) config["chat_template"] = *tables.chat_template;
  return {dumped(root), dumped(config), dumped(generation)};
}

}  // namespace sparsek
