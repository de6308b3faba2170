// Any bytes as text, for each pre-tokenizer: decoding gives the bytes back, and however the text is cut into chunks the
// ids are the same. The first byte chooses the pre-tokenizer and the chunks, the rest is the text.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "data/gguf.h"
#include "data/tokenizer.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sparsek {
namespace {

void check(const Tokenizer& tokenizer, std::string_view text, size_t chunk_bytes, bool has_nfc) {
  for (const auto special : {SpecialTokens::kAsText, SpecialTokens::kParse}) {
    const std::vector<TokenId> whole = tokenizer.encode(text, special);
    if (!has_nfc && tokenizer.decode(whole) != text) std::abort();
    Encoder encoder(tokenizer, special);
    std::vector<TokenId> ids;
    for (size_t i = 0; i < text.size(); i += chunk_bytes) encoder.push(text.substr(i, chunk_bytes), ids);
    encoder.finish(ids);
    if (ids != whole) std::abort();
    TextStream stream(tokenizer);
    std::string streamed;
    for (const TokenId id : whole) streamed += stream.push(id);
    if (streamed + stream.finish() != tokenizer.decode(whole)) std::abort();
  }
}

}  // namespace
}  // namespace sparsek

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<sparsek::Tokenizer> tokenizers = sparsek::small_tokenizers();
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const size_t kind = data[0] % tokenizers.size();
  const size_t chunk_bytes = 1 + data[0] / tokenizers.size();
  sparsek::check(tokenizers[kind], text, chunk_bytes, kind == sparsek::kNfcTokenizer);
  return 0;
}
