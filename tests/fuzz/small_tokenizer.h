// Small tokenizers with every byte, a few merges and fixed tokens: one per pre-tokenizer, and Qwen's with NFC.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "data/byte_alphabet.h"
#include "data/tokenizer.h"

namespace sparsek {

constexpr size_t kNfcTokenizer = 4;

inline std::vector<Tokenizer> small_tokenizers() {
  const ByteAlphabet alphabet;
  const auto vocabulary = [&] {
    std::string json;
    for (int byte = 0; byte < 256; ++byte) {
      const std::string text(alphabet.text(static_cast<uint8_t>(byte)));
      json += "\"" + (text == "\"" || text == "\\" ? "\\" + text : text) + "\":" + std::to_string(byte) + ",";
    }
    return json + R"("th":256,"the":257,"\u0120the":258,"aa":259,"aaaa":260,"\u0120\u0120":261)";
  };
  const auto model = [&](std::string_view normaliser, std::string_view pre_tokenizers) {
    return R"({"normalizer":)" + std::string(normaliser) + R"(,"pre_tokenizer":{"type":"Sequence","pretokenizers":[)" +
           std::string(pre_tokenizers) + R"(]},"added_tokens":[{"id":262,"content":"<|end|>","special":true},)" +
           R"({"id":263,"content":"<|end|>>","special":true},{"id":264,"content":"<t>","special":false}],)" +
           R"("model":{"type":"BPE","vocab":{)" + vocabulary() +
           R"(},"merges":["t h","th e","\u0120 the","a a","aa aa","\u0120 \u0120"]}})";
  };
  const auto words = [](std::string_view numbers) {
    return R"({"type":"Split","behavior":"Isolated","pattern":{"Regex":")"
           R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|)" +
           std::string(numbers) +
           R"(| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}},{"type":"ByteLevel","use_regex":false})";
  };
  const std::string byte_level = R"({"type":"ByteLevel"})";
  std::vector<Tokenizer> tokenizers;
  for (const std::string& json :
       {model("null", byte_level), model("null", R"({"type":"Digits","individual_digits":true},)" + byte_level),
        model("null", words("\\\\p{N}{1,3}")), model("null", words("\\\\p{N}")),
        model(R"({"type":"NFC"})", words("\\\\p{N}"))}) {
    tokenizers.push_back(Tokenizer::from_json(json, "", "small tokenizer"));
  }
  return tokenizers;
}

}  // namespace sparsek
