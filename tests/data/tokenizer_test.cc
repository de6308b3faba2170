// Tokenizer parts by themselves: UTF-8 steps, merging against a plain transcription, streams against wholes, and what
// GGUF metadata is refused. Ids against another implementation: tests/python/test_tokenizer.py.
#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "data/bpe.h"
#include "data/byte_alphabet.h"
#include "data/chat_template.h"
#include "data/gguf.h"
#include "data/normaliser.h"
#include "data/text_reader.h"
#include "data/utf8.h"
#include "tests/data/support.h"

namespace sparsek {
namespace {

using test::Bytes;
using test::expect_refused;

TEST(Utf8, StepsSayWhatBytesForm) {
  const auto step = [](std::string_view text) {
    const Utf8Step step = utf8_step(text);
    return std::pair(step.kind, step.length);
  };
  EXPECT_EQ(step("a\xff"), std::pair(Utf8Kind::kCharacter, 1));
  EXPECT_EQ(step("\xc3\xa9x"), std::pair(Utf8Kind::kCharacter, 2));
  EXPECT_EQ(step("\xe2\x82\xac"), std::pair(Utf8Kind::kCharacter, 3));
  EXPECT_EQ(step("\xf4\x8f\xbf\xbf"), std::pair(Utf8Kind::kCharacter, 4));
  EXPECT_EQ(step("\xe2\x82"), std::pair(Utf8Kind::kIncomplete, 2));
  EXPECT_EQ(step("\xf0"), std::pair(Utf8Kind::kIncomplete, 1));
  for (const std::string_view bad : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
                                     "\xf4\x90\x80\x80", "\xf5", "\xff", "\xe2\x41", "\xe2\x82\x41"}) {
    EXPECT_EQ(step(bad), std::pair(Utf8Kind::kInvalid, 1));
  }
  EXPECT_EQ(utf8_valid_prefix("0123456789\xc3\xa9 0123456789\xff"), 23u);
  EXPECT_EQ(utf8_incomplete_suffix("abc\xf0\x9f\x98"), 3u);
  EXPECT_EQ(utf8_incomplete_suffix("abc\xf0\x9f\x98\x80"), 0u);
  EXPECT_EQ(utf8_incomplete_suffix("abc\x80\x80"), 0u);
  EXPECT_EQ(utf8_incomplete_suffix(""), 0u);
}

TEST(ByteAlphabet, EveryByteHasItsCharacter) {
  const ByteAlphabet alphabet;
  std::set<std::string> texts;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(alphabet.text(static_cast<uint8_t>(byte)));
    texts.insert(text);
    std::string bytes = "x";
    ASSERT_TRUE(alphabet.append_bytes(text, bytes));
    EXPECT_EQ(bytes, std::string("x") + static_cast<char>(byte));
  }
  EXPECT_EQ(texts.size(), 256u);
  EXPECT_EQ(alphabet.text(' '), "\u0120");
  std::string bytes = "x";
  EXPECT_FALSE(alphabet.append_bytes("a b", bytes));
  EXPECT_EQ(bytes, "x");
}

// Merging as its definition says it, over the whole list each time.
std::vector<TokenId> merge_plainly(const std::vector<Bpe::Merge>& merges, std::vector<TokenId> ids) {
  std::map<std::pair<TokenId, TokenId>, size_t> ranks;
  for (size_t i = 0; i < merges.size(); ++i) ranks[{merges[i].left, merges[i].right}] = i;
  while (true) {
    size_t best = merges.size();
    size_t at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto it = ranks.find({ids[i], ids[i + 1]});
      if (it != ranks.end() && it->second < best) {
        best = it->second;
        at = i;
      }
    }
    if (best == merges.size()) return ids;
    ids[at] = merges[best].merged;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(Bpe, EqualsAPlainTranscription) {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 rng(seed);
    const int num_letters = 2 + static_cast<int>(rng() % 3);
    std::array<TokenId, 256> byte_ids;
    byte_ids.fill(-1);
    for (int i = 0; i < num_letters; ++i) byte_ids[static_cast<size_t>('a' + i)] = i;
    std::vector<Bpe::Merge> merges;
    std::set<std::pair<TokenId, TokenId>> seen;
    for (TokenId next = num_letters; next < num_letters + 12; ++next) {
      const auto left = static_cast<TokenId>(rng() % static_cast<uint32_t>(next));
      const auto right = static_cast<TokenId>(rng() % static_cast<uint32_t>(next));
      if (seen.insert({left, right}).second) merges.push_back({left, right, next});
    }
    std::shuffle(merges.begin(), merges.end(), rng);  // a merge may come before those that make its parts
    const Bpe bpe(byte_ids, merges, std::nullopt, false);
    Bpe::Scratch scratch;
    for (const size_t length : {1, 2, 7, 40, 47, 48, 49, 50, 200}) {
      std::string piece;
      std::vector<TokenId> letters;
      for (size_t i = 0; i < length; ++i) {
        letters.push_back(static_cast<TokenId>(rng() % static_cast<uint32_t>(num_letters)));
        piece += static_cast<char>('a' + letters.back());
      }
      std::vector<TokenId> ids;
      bpe.encode(piece, ids, scratch);
      ASSERT_EQ(ids, merge_plainly(merges, letters)) << piece;
    }
  }
}

TEST(Bpe, BytesWithoutATokenVanishOrBecomeUnknown) {
  std::array<TokenId, 256> byte_ids;
  byte_ids.fill(-1);
  byte_ids['a'] = 0;
  Bpe::Scratch scratch;
  const auto encode = [&](std::optional<TokenId> unknown, bool fuses) {
    std::vector<TokenId> ids;
    Bpe(byte_ids, {{0, 0, 1}}, unknown, fuses).encode("axxa", ids, scratch);
    return ids;
  };
  EXPECT_EQ(encode(std::nullopt, false), (std::vector<TokenId>{1}));
  EXPECT_EQ(encode(7, false), (std::vector<TokenId>{0, 7, 7, 0}));
  EXPECT_EQ(encode(7, true), (std::vector<TokenId>{0, 7, 0}));
}

TEST(Normaliser, CutsDoNotMatter) {
  const std::string text =
      "e\u0301a \u0065\u0323\u0307 \u212b \u1112\u1161\u11ab \uac00\u11a8 \u304b\u3099 \u4e00\u0301x " +
      std::string(40'000, 'z') + [] {
        std::string marks;
        for (int i = 0; i < 50'000; ++i) marks += "\u0301\u0323";
        return marks;
      }();
  const auto normalised = [&](size_t chunk) {
    NfcNormaliser normaliser;
    std::string out;
    for (size_t i = 0; i < text.size();) {
      size_t end = std::min(text.size(), i + chunk);
      while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
      normaliser.push(std::string_view(text).substr(i, end - i), out);
      i = end;
    }
    normaliser.finish(out);
    return out;
  };
  const std::string whole = normalised(text.size());
  EXPECT_TRUE(whole.starts_with("\u00e9a \u1eb9\u0307 \u00c5 \ud55c \uac01 \u304c \u4e00\u0301x z"));
  EXPECT_EQ(whole, normalised(1000));
  EXPECT_EQ(whole, normalised(65'537));
}

// Every byte a token (ids 0 to 255), some merges and fixed tokens.
Bytes small_tokenizer(std::string_view pre) {
  const ByteAlphabet alphabet;
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(alphabet.text(static_cast<uint8_t>(byte)));
  for (const char* text : {"th", "the", "\u0120the", "aa", "aaaa", "<|end|>", "<|end|>>", "<tool>", "<unused>"}) {
    tokens.emplace_back(text);
  }
  Bytes bytes;
  bytes.header(0, 6).text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre);
  bytes.texts("tokenizer.ggml.tokens", tokens);
  bytes.texts("tokenizer.ggml.merges", {"t h", "th e", "\u0120 the", "a a", "aa aa"});
  bytes.uint32("tokenizer.ggml.bos_token_id", 261);
  bytes.string("tokenizer.ggml.token_type").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) bytes.put<int32_t>(i < 261 ? 1 : i < 263 ? 3 : i == 263 ? 4 : 5);
  return bytes;
}

Tokenizer small(std::string_view pre) {
  const Bytes bytes = small_tokenizer(pre);
  return Tokenizer::from_gguf(GgufFile::from_bytes(bytes.span(), "small.gguf"));
}

TEST(Tokenizer, FixedTokens) {
  const Tokenizer tokenizer = small("gpt-2");
  using Ids = std::vector<TokenId>;
  EXPECT_EQ(tokenizer.encode("the<|end|> the", SpecialTokens::kParse), (Ids{257, 261, 258}));
  EXPECT_EQ(tokenizer.encode("<|end|>>", SpecialTokens::kParse), (Ids{262}));
  EXPECT_EQ(tokenizer.encode("<|end|>", SpecialTokens::kAsText).size(), 7u);
  EXPECT_EQ(tokenizer.encode("<tool>", SpecialTokens::kAsText), (Ids{263}));
  EXPECT_EQ(tokenizer.encode("<unused>", SpecialTokens::kParse).size(), 8u);
  EXPECT_EQ(tokenizer.encode("", SpecialTokens::kParse), Ids{});
  EXPECT_EQ(tokenizer.find_special("<|end|>>"), 262);
  EXPECT_FALSE(tokenizer.find_special("the").has_value());
  EXPECT_TRUE(tokenizer.is_special(261));
  EXPECT_FALSE(tokenizer.is_special(263));
  EXPECT_FALSE(tokenizer.is_special(-1));
  EXPECT_EQ(tokenizer.decode(Ids{258, 261, 9999, -5}), " the<|end|>");
  EXPECT_EQ(tokenizer.prefix(), Ids{});
  EXPECT_EQ(small("llama-bpe").prefix(), (Ids{261}));
  EXPECT_TRUE(tokenizer.missing_bytes().empty());
}

TEST(Tokenizer, AnyBytesRoundTripInAnyChunks) {
  for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
    const Tokenizer tokenizer = small(pre);
    for (uint32_t seed = 0; seed < 40; ++seed) {
      SCOPED_TRACE(pre + std::to_string(seed));
      std::mt19937 rng(seed);
      const std::vector<std::string> parts = {
          "the ", "aaaa", "<|end|>", "<|en",         "\xe2\x82\xac", "\xf0\x9f\x98",       "\xff",  "\r\n",
          "   ",  "'ll",  "12345",   "\xed\xa0\x80", "\xc3",         std::string(1, '\0'), "<tool>"};
      std::string text;
      for (int i = 0; i < 60; ++i) text += parts[rng() % parts.size()];
      const std::vector<TokenId> whole = tokenizer.encode(text, SpecialTokens::kParse);
      EXPECT_EQ(tokenizer.decode(whole), text);
      Encoder encoder(tokenizer, SpecialTokens::kParse);
      for (int round = 0; round < 2; ++round) {  // an encoder is as new after finish()
        std::vector<TokenId> ids;
        for (size_t i = 0; i < text.size();) {
          const size_t size = round == 0 ? 1 : 1 + rng() % 9;
          encoder.push(std::string_view(text).substr(i, size), ids);
          i += size;
        }
        encoder.finish(ids);
        ASSERT_EQ(ids, whole);
      }
      TextStream stream(tokenizer);
      std::string streamed;
      for (const TokenId id : whole) streamed += stream.push(id);
      EXPECT_EQ(streamed + stream.finish(), text);
    }
  }
}

TEST(TextStream, ShowsWholeCharactersOnly) {
  const Tokenizer tokenizer = small("gpt-2");  // a token for each byte of these
  TextStream stream(tokenizer);
  std::vector<std::string> shown;
  for (const TokenId id : tokenizer.encode("a\u20ac\U0001f600", SpecialTokens::kAsText))
    shown.push_back(stream.push(id));
  EXPECT_EQ(shown, (std::vector<std::string>{"a", "", "", "\u20ac", "", "", "", "\U0001f600"}));
  EXPECT_EQ(stream.push(0xf0), "");
  EXPECT_EQ(stream.push(0x9f), "");
  EXPECT_EQ(stream.push('x'), "\xf0\x9fx");  // will never be a character
  EXPECT_EQ(stream.push(0xf0), "");
  EXPECT_EQ(stream.finish(), "\xf0");
  EXPECT_EQ(stream.finish(), "");
}

// A word longer than the encoder holds is cut at the same places, however the text arrives.
TEST(Tokenizer, EndlessWordsAreCutTheSameWay) {
  const Tokenizer tokenizer = small("qwen2");
  std::string text(1'300'000, 'a');
  text += " the " + std::string(1'100'000, ' ') + "x";
  const std::vector<TokenId> whole = tokenizer.encode(text, SpecialTokens::kAsText);
  EXPECT_EQ(tokenizer.decode(whole), text);
  Encoder encoder(tokenizer, SpecialTokens::kAsText);
  std::vector<TokenId> ids;
  for (size_t i = 0; i < text.size(); i += 100'003) encoder.push(std::string_view(text).substr(i, 100'003), ids);
  encoder.finish(ids);
  EXPECT_EQ(ids, whole);
}

TEST(Tokenizer, VocabularyAndModelMustAgree) {
  const Tokenizer tokenizer = small("gpt-2");
  EXPECT_EQ(tokenizer.vocab_size(), 265);
  EXPECT_NO_THROW(tokenizer.check_model_vocab(265, "m"));
  EXPECT_NO_THROW(tokenizer.check_model_vocab(320, "m"));
  expect_refused([&] { tokenizer.check_model_vocab(264, "m.gguf"); }, {"m.gguf", "265", "small.gguf", "264"});
}

TEST(Tokenizer, WrongGgufMetadata) {
  const auto refused = [](const Bytes& bytes, std::initializer_list<std::string_view> words) {
    expect_refused([&] { Tokenizer::from_gguf(GgufFile::from_bytes(bytes.span(), "t.gguf")); }, words);
    expect_refused([&] { Tokenizer::from_gguf(GgufFile::from_bytes(bytes.span(), "t.gguf")); }, {"t.gguf"});
  };
  const auto start = [](uint64_t num_more) {
    Bytes bytes;
    bytes.header(0, 2 + num_more).text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
    return bytes;
  };
  const std::vector<std::string> tokens = {"a", "b", "ab"};
  refused(Bytes().header(0, 0), {"tokenizer.ggml.model"});
  refused(Bytes().header(0, 1).text("tokenizer.ggml.model", "llama"), {"'gpt2'", "'llama'"});
  refused(Bytes().header(0, 1).text("tokenizer.ggml.model", "gpt2"), {"tokenizer.ggml.pre", "''"});
  refused(Bytes().header(0, 2).text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "tekken"), {"'tekken'"});
  refused(start(0), {"tokenizer.ggml.tokens"});
  refused(start(1).texts("tokenizer.ggml.tokens", tokens), {"tokenizer.ggml.merges"});
  const auto full = [&](uint64_t num_more, const std::vector<std::string>& merges) {
    return start(2 + num_more).texts("tokenizer.ggml.tokens", tokens).texts("tokenizer.ggml.merges", merges);
  };
  EXPECT_NO_THROW(Tokenizer::from_gguf(GgufFile::from_bytes(full(0, {"a b"}).span(), "t.gguf")));
  for (const char* merge : {"ab", "a", " a", "a ", "a  b", "a b c", ""}) refused(full(0, {merge}), {"merge 0"});
  refused(full(0, {"a b", "a c"}), {"merge 1", "'c'"});
  refused(full(0, {"b a"}), {"merge 0", "'ba'"});
  refused(full(0, {"a b", "a b"}), {"merge 1", "twice"});
  refused(full(1, {"a b"}).uint32("tokenizer.ggml.bos_token_id", 3), {"BOS", "3"});
  refused(full(1, {"a b"}).uint32("tokenizer.ggml.eos_token_id", 70'000), {"end token", "70000"});
  refused(full(1, {"a b"}).string("tokenizer.ggml.add_bos_token").put<uint32_t>(7).put<uint8_t>(1), {"BOS"});
  Bytes types = full(1, {"a b"});
  types.string("tokenizer.ggml.token_type").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(2).put(1).put(1);
  refused(types, {"token_type", "3", "2"});
  Bytes odd_type = full(1, {"a b"});
  odd_type.string("tokenizer.ggml.token_type").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(3).put(1).put(1).put(9);
  refused(odd_type, {"token_type", "token 2", "9"});
  refused(start(2).texts("tokenizer.ggml.tokens", {}).texts("tokenizer.ggml.merges", {}), {"no tokens"});
  refused(start(2).texts("tokenizer.ggml.tokens", {"long"}).texts("tokenizer.ggml.merges", {}), {"single byte"});
}

TEST(Tokenizer, WrongJson) {
  const auto refused = [](std::string_view json, std::initializer_list<std::string_view> words) {
    expect_refused([&] { Tokenizer::from_json(json, "", "tokenizer.json"); }, words);
  };
  refused("", {"tokenizer.json", "JSON"});
  refused("{", {"tokenizer.json", "JSON", "byte"});
  refused("[]", {"tokenizer.json", "pre_tokenizer"});
  refused(R"({"pre_tokenizer":{"type":"ByteLevel"}})", {"tokenizer.json", "model"});
  refused(R"({"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0}}})", {"merges"});
  refused(R"({"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":"0"},"merges":[]}})", {"vocab"});
  refused(R"({"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0},"merges":[7]}})", {"merges"});
  EXPECT_NO_THROW(Tokenizer::from_json(
      R"({"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0},"merges":[]}})", "", "t"));
}

TEST(ChatTemplate, Llama31SystemPreamble) {
  const std::string jinja =
      "{{ bos_token }}{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}"
      "{{- \"Cutting Knowledge Date: December 2023\\n\" }}{%- for message in messages %}"
      "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
      "'<|eot_id|>' }}"
      "{%- endfor %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}";
  const ChatTemplate chat = ChatTemplate::recognise(jinja, "t");
  EXPECT_EQ(chat.style, ChatStyle::kLlama3);
  const std::vector<ChatMessage> messages = {{"system", " Be brief. "}, {"user", "Hi"}};
  EXPECT_EQ(
      chat.render(messages),
      "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
      "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(ChatTemplate, Qwen3ForgetsThoughts) {
  const std::string jinja =
      "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
      "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{{- '<|im_start|>assistant\\n' }}";
  const ChatTemplate chat = ChatTemplate::recognise(jinja, "t");
  const std::vector<ChatMessage> messages = {{"user", "a</think>b"}, {"assistant", "<think>hm</think>\n\nyes"}};
  EXPECT_EQ(chat.render(messages),
            "<|im_start|>user\na</think>b<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, OthersAreNamed) {
  expect_refused([] { ChatTemplate::recognise("", "m.gguf"); }, {"m.gguf", "ChatML", "Llama 3"});
  expect_refused([] { ChatTemplate::recognise("{{ '<|im_start|>' + message['role'] + '<|im_sep|>' }}", "m.gguf"); },
                 {"m.gguf", "im_sep"});
}

TEST(TextReader, ReadsInChunksAndNamesWhatItCannot) {
  const test::TemporaryFolder folder;
  const std::string content = std::string("a\0\xff", 3) + std::string(100, 'x');
  TextReader reader(folder.write("text", content), 16);
  EXPECT_EQ(reader.size_bytes(), 103);
  std::string read;
  for (std::string_view chunk = reader.next(); !chunk.empty(); chunk = reader.next()) {
    EXPECT_LE(chunk.size(), 16u);
    read += chunk;
  }
  EXPECT_EQ(read, content);
  EXPECT_EQ(reader.bytes_read(), 103);
  TextReader empty(folder.write("empty", ""));
  EXPECT_TRUE(empty.next().empty());
  expect_refused([&] { TextReader(folder.file("none")); }, {"none", "No such file"});
  expect_refused([&] { TextReader(folder.file("")); }, {"directory"});
}

}  // namespace
}  // namespace sparsek
